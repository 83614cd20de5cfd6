"""How the report looks beside the look of all pages, and the few lines of script that answer the pointer."""

# ruff: noqa: E501
CSS = """
.bars{margin:10px 0 8px;display:grid;grid-template-columns:minmax(64px,max-content) 1fr max-content;gap:5px 10px;
align-items:center;font-size:13px}
.bars .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:150px}
.bars .track{height:10px;border-radius:5px;background:var(--grid);overflow:hidden}
.bars .track i{display:block;height:100%;border-radius:5px;min-width:2px}
.bars .value{text-align:right;font-variant-numeric:tabular-nums}
tbody th small{display:block;font-weight:400;color:var(--soft);max-width:46ch;line-height:1.35}
td small{display:block;color:var(--soft);white-space:nowrap}
td.own{font-weight:650}td.own small{font-weight:400}
td.plot,th.plot{width:250px;text-align:left;padding-left:16px}
td.plot svg{display:block;width:230px;height:auto}
.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px;vertical-align:0}
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
.maps{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr))}
svg.map{display:block;width:100%;height:auto}.maps figure{max-width:640px}
svg.map circle{fill:var(--c);stroke:var(--card);stroke-width:.6;cursor:pointer}
svg.map.dim circle{opacity:.12}svg.map.dim circle.on{opacity:1}
.pairs{display:grid;gap:0 32px;grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr))}
.pairs .query{grid-template-columns:150px 1fr}.pairs .asked img{height:104px}
.two h3+*{margin-bottom:18px}
.matrix svg{display:block;width:100%;height:auto}
.two{display:grid;gap:14px 28px;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));align-items:start}
#tip img{display:block;width:112px;height:112px;object-fit:cover;border-radius:5px;margin-bottom:4px}
.notes{margin:6px 0 0;padding-left:20px}.notes li{margin:2px 0;overflow-wrap:anywhere}
@media (max-width:720px){.query,.pairs .query{grid-template-columns:1fr}.found figure,.found img,.missing{width:84px}
.found img,.missing{height:84px}.found .gap{width:94px}
table.metrics,table.metrics tbody,table.metrics tr,table.metrics th,table.metrics td{display:block;text-align:left}
table.metrics thead{display:none}table.metrics tr{border-top:1px solid var(--line);padding:10px 0}
table.metrics th,table.metrics td{border:0;padding:2px 0;min-width:0;width:auto}
table.metrics td[data-of]::before{content:attr(data-of);float:left;width:46%;font-weight:400;color:var(--soft);
overflow:hidden;text-overflow:ellipsis;white-space:nowrap;padding-right:8px}
table.metrics td small{display:inline;margin-left:6px}td.plot svg{width:100%;max-width:340px}}
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
