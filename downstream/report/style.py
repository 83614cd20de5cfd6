"""How the report looks, and the few lines of script that answer the pointer; no fonts, no network."""

# ruff: noqa: E501
CSS = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1d21;--soft:#5c626c;--line:#e2e2dc;--grid:#ececE6;
--own:#2459c9;--own-soft:#dbe6fb;--base:#8b9099;--other:#c2621b;--third:#7a4fb5;--right:#1c8a4c;--wrong:#c33d35}
@media (prefers-color-scheme:dark){:root{--page:#131519;--card:#1c1f25;--ink:#e9eaec;--soft:#a0a6b1;--line:#31353d;
--grid:#2a2e36;--own:#7aa5ff;--own-soft:#22345c;--base:#8a909b;--other:#f0995a;--third:#bb96ee;--right:#4fc57f;
--wrong:#f0776e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main,header>div,footer{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding:40px 0 8px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:21px;letter-spacing:-.01em;margin:48px 0 4px}
h3{font-size:16px;margin:0 0 2px}
p{margin:0 0 10px}
.lead,.soft,caption,figcaption{color:var(--soft)}
.lead{max-width:75ch}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 0;font-size:14px}
a{color:var(--own);text-decoration:none}a:hover{text-decoration:underline}
dl.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:16px 0 0}
dl.facts div{min-width:0}dt{font-size:12px;color:var(--soft)}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:14px 0;min-width:0}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr))}
.grid>.card{margin:0}
.big{font-size:36px;font-weight:650;letter-spacing:-.02em;line-height:1.15;font-variant-numeric:tabular-nums}
.big small{font-size:15px;font-weight:400;color:var(--soft);letter-spacing:0;white-space:nowrap}
.bars{margin:10px 0 8px;display:grid;grid-template-columns:minmax(64px,max-content) 1fr max-content;gap:5px 10px;
align-items:center;font-size:13px}
.bars .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:150px}
.bars .track{height:10px;border-radius:5px;background:var(--grid);overflow:hidden}
.bars .track i{display:block;height:100%;border-radius:5px;min-width:2px}
.bars .value{text-align:right;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 10px;text-align:right;border-top:1px solid var(--line);vertical-align:middle}
thead th{border-top:0;overflow-wrap:anywhere;min-width:5.5em;font-size:12.5px;font-weight:600;color:var(--soft);vertical-align:bottom}
tbody th{text-align:left;font-weight:600;min-width:210px}
tbody th small{display:block;font-weight:400;color:var(--soft);max-width:46ch;line-height:1.35}
td small{display:block;color:var(--soft);white-space:nowrap}
td.own{font-weight:650}td.own small{font-weight:400}
td.plot,th.plot{width:250px;text-align:left;padding-left:16px}
td.plot svg{display:block;width:230px;height:auto}
.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px;vertical-align:0}
.wide{overflow-x:auto}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
svg.curve{display:block;width:100%;height:auto;margin-top:6px;touch-action:pan-y}
.now{float:right;font-weight:600;font-variant-numeric:tabular-nums}
.query{display:grid;grid-template-columns:minmax(150px,240px) 1fr;gap:8px 18px;padding:12px 0;border-top:1px solid var(--line)}
.query:first-of-type{border-top:0}.pairs .query:nth-of-type(2){border-top:0}
.query blockquote{margin:0;font-size:15px;overflow-wrap:anywhere}
.query blockquote+p,.asked p{margin:4px 0 0;font-size:13px;color:var(--soft)}
.asked img{max-width:100%;height:128px;object-fit:cover;border-radius:8px;display:block}
.found{display:flex;flex-wrap:wrap;gap:8px;min-width:0}
.found figure{margin:0;width:104px}
.found img,.missing{width:104px;height:104px;object-fit:cover;border-radius:8px;display:block;background:var(--grid);
border:3px solid transparent}
.missing{font-size:11px;padding:6px;overflow:hidden;color:var(--soft)}
.found .right img,.found .right .missing{border-color:var(--right)}
.found figcaption{font-size:11.5px;line-height:1.3;padding:3px 2px 0;overflow-wrap:anywhere}
.found .right figcaption{color:var(--right);font-weight:600}
.found .gap{border-left:2px dotted var(--line);padding-left:8px;width:114px}
ol.texts{margin:0;padding-left:24px;font-size:14px}ol.texts li{padding:1px 0;overflow-wrap:anywhere}
ol.texts li.right{color:var(--right);font-weight:600}
.tag{display:inline-block;font-size:12px;border-radius:11px;padding:1px 9px;border:1px solid var(--line);color:var(--soft)}
.tag.right{color:var(--right);border-color:currentColor}.tag.wrong{color:var(--wrong);border-color:currentColor}
.maps{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr))}
svg.map{display:block;width:100%;height:auto}.maps figure{max-width:640px}
svg.map circle{fill:var(--c);stroke:var(--card);stroke-width:.6;cursor:pointer}
svg.map.dim circle{opacity:.12}svg.map.dim circle.on{opacity:1}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin-top:8px}
.legend span{cursor:default}
.pairs{display:grid;gap:0 32px;grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr))}
.pairs .query{grid-template-columns:150px 1fr}.pairs .asked img{height:104px}
.two h3+*{margin-bottom:18px}
.matrix svg{display:block;width:100%;height:auto}
.two{display:grid;gap:14px 28px;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));align-items:start}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:8px;
box-shadow:0 4px 18px rgba(0,0,0,.22);padding:6px;font-size:12.5px;max-width:190px;display:none}
#tip img{display:block;width:112px;height:112px;object-fit:cover;border-radius:5px;margin-bottom:4px}
details summary{cursor:pointer;font-weight:600}
.notes{margin:6px 0 0;padding-left:20px}.notes li{margin:2px 0;overflow-wrap:anywhere}
.empty{border-style:dashed;color:var(--soft)}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
footer{padding-top:28px;padding-bottom:48px;font-size:13px;color:var(--soft)}
@media (max-width:720px){main,header>div,footer{padding-left:14px;padding-right:14px}header{padding-top:24px}
h1{font-size:24px}.card{padding:14px}.query,.pairs .query{grid-template-columns:1fr}.found figure,.found img,.missing{width:84px}
.found img,.missing{height:84px}.found .gap{width:94px}
table.metrics,table.metrics tbody,table.metrics tr,table.metrics th,table.metrics td{display:block;text-align:left}
table.metrics thead{display:none}table.metrics tr{border-top:1px solid var(--line);padding:10px 0}
table.metrics th,table.metrics td{border:0;padding:2px 0;min-width:0;width:auto}
table.metrics td[data-of]::before{content:attr(data-of);float:left;width:46%;font-weight:400;color:var(--soft);
overflow:hidden;text-overflow:ellipsis;white-space:nowrap;padding-right:8px}
table.metrics td small{display:inline;margin-left:6px}td.plot svg{width:100%;max-width:340px}}
@media print{body{background:#fff}.card{break-inside:avoid}nav{display:none}}
"""

JS = """
(function(){var tip=document.getElementById('tip');
function place(e){var w=tip.offsetWidth,h=tip.offsetHeight,x=e.clientX+14,y=e.clientY+14;
if(x+w>innerWidth)x=e.clientX-w-14;if(y+h>innerHeight)y=e.clientY-h-14;tip.style.left=Math.max(0,x)+'px';tip.style.top=Math.max(0,y)+'px'}
function hide(){tip.style.display='none'}
document.querySelectorAll('svg.map').forEach(function(map){
map.addEventListener('pointermove',function(e){var c=e.target;if(c.tagName!=='circle'){hide();return}
tip.textContent='';if(c.dataset.src){var i=new Image();i.src=c.dataset.src;tip.appendChild(i)}
tip.appendChild(document.createTextNode(c.dataset.name||''));tip.style.display='block';place(e)});
map.addEventListener('pointerleave',hide)});
document.querySelectorAll('.legend span[data-class]').forEach(function(s){
function mark(on){document.querySelectorAll('#'+s.parentNode.dataset.maps+' svg.map').forEach(function(m){
m.classList.toggle('dim',on);m.querySelectorAll('circle').forEach(function(c){
c.classList.toggle('on',on&&c.dataset.c===s.dataset.class)})})}
s.addEventListener('pointerenter',function(){mark(true)});s.addEventListener('pointerleave',function(){mark(false)})});
document.querySelectorAll('svg.curve').forEach(function(v){var p=JSON.parse(v.dataset.points),line=v.querySelector('.cross');
v.addEventListener('pointermove',function(e){var b=v.getBoundingClientRect(),x=(e.clientX-b.left)*+v.dataset.width/b.width,n=p[0];
p.forEach(function(q){if(Math.abs(q[0]-x)<Math.abs(n[0]-x))n=q});
line.setAttribute('x1',n[0]);line.setAttribute('x2',n[0]);line.style.display='';
tip.textContent=n[1];tip.style.display='block';place(e)});
v.addEventListener('pointerleave',function(){line.style.display='none';hide()})})})();
"""
