"""What a run's page has beside the look of all pages: its own rules, and the script that draws its curves."""

STYLE = """
.done,.stack{display:flex;height:14px;border-radius:7px;overflow:hidden;background:var(--grid);margin-top:14px}
.done{height:6px}.done i{background:var(--own)}.stack i{min-width:1px}
.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px}
.c0{background:var(--wrong)}.c1{background:var(--other)}.c2{background:var(--own)}.c3{background:var(--third)}
.c4{background:var(--right)}.c5{background:var(--base)}.c6{background:#b8930b}.c7{background:#0f8b94}
.switches{display:flex;gap:18px;margin:18px 0 -20px;font-size:14px}.switches label{cursor:pointer}
.grid .soft{font-size:13px;min-height:2.6em;line-height:1.3}
.tall{max-height:420px;overflow-y:auto}pre.card{max-height:520px;overflow:auto;line-height:1.4}
table.lines th,table.lines td{text-align:left;padding:5px 10px;font-size:13.5px;overflow-wrap:anywhere}
table.lines tbody th{min-width:7em}table.lines td:first-child{white-space:nowrap}
table.lines tr:first-child td,table.lines tr:first-child th{border-top:0}
"""

SCRIPT = r"""
(function(){
var holder=document.getElementById('data');if(!holder)return;
var data=JSON.parse(holder.textContent),tip=document.getElementById('tip'),W=340,H=170,L=48,R=8,T=8,B=22;
var smooth=document.getElementById('smooth'),log=document.getElementById('log');
['smooth','log'].forEach(function(k){try{var s=localStorage.getItem('polyview.'+k);
if(s!==null)document.getElementById(k).checked=s==='1'}catch(e){}});
function put(svg,tag,attributes,text){var e=document.createElementNS('http://www.w3.org/2000/svg',tag);
for(var k in attributes)e.setAttribute(k,attributes[k]);if(text!==undefined)e.textContent=text;
svg.appendChild(e);return e}
function number(v){var a=Math.abs(v);if(v===0)return'0';
if(a<1e-3||a>=1e6)return v.toExponential(2).replace(/\.?0+e/,'e');
return String(+v.toPrecision(4)).replace(/^(-?\d{4,})(?=\.|$)/,function(d){return(+d).toLocaleString('en')})}
function ticks(low,high){if(high-low<=1e-9*Math.max(Math.abs(low),Math.abs(high),1e-300)){
var pad=Math.abs(low)*.1||1;low-=pad;high+=pad}
var rough=(high-low)/4,power=Math.pow(10,Math.floor(Math.log10(rough))),step=[1,2,2.5,5,10].map(function(m){
return m*power}).filter(function(s){return s>=rough*.999})[0],found=[];
for(var i=Math.floor(low/step+1e-9);i<=Math.ceil(high/step-1e-9);i++)found.push(i*step);return found}
function powers(low,high){var a=Math.floor(Math.log10(low)+1e-9),b=Math.ceil(Math.log10(high)-1e-9),found=[];
if(a===b)b++;var by=Math.max(1,Math.ceil((b-a)/5));
for(var i=a;i<b+by;i+=by)found.push(Math.pow(10,i));return found}
function mean(points){var reach=Math.max(1,Math.floor(points.length/40)),sums=[0];
points.forEach(function(p){sums.push(sums[sums.length-1]+p[1])});
return points.map(function(p,i){var lo=Math.max(0,i-reach),hi=Math.min(points.length,i+reach+1);
return[p[0],(sums[hi]-sums[lo])/(hi-lo)]})}
function draw(svg){var points=data.curves[+svg.dataset.curve];svg.textContent='';if(!points.length)return;
var values=points.map(function(p){return p[1]}),least=Math.min.apply(null,values),most=Math.max.apply(null,values);
var by10=log.checked&&least>0,marks=by10?powers(least,most):ticks(least,most),low=marks[0],high=marks[marks.length-1];
var first=points[0][0],last=Math.max(points[points.length-1][0],first+1);
function x(s){return L+(s-first)/(last-first)*(W-L-R)}
function y(v){var part=by10?Math.log(v/low)/Math.log(high/low):(v-low)/(high-low);return H-B-part*(H-T-B)}
function path(ps,opacity,width){put(svg,'path',{d:'M'+ps.map(function(p){
return x(p[0]).toFixed(1)+' '+y(p[1]).toFixed(1)})
.join('L'),fill:'none',stroke:'var(--own)','stroke-width':width,'stroke-opacity':opacity,'stroke-linejoin':'round'})}
marks.forEach(function(v){put(svg,'line',{x1:L,x2:W-R,y1:y(v),y2:y(v),stroke:'var(--grid)'});
put(svg,'text',{x:L-6,y:y(v)+3.5,'text-anchor':'end'},number(v))});
data.marks.forEach(function(m){if(m[0]<first||m[0]>last)return;
var e=put(svg,'line',{x1:x(m[0]),x2:x(m[0]),y1:T,y2:H-B,stroke:m[1]==='resume'?'var(--base)':'var(--wrong)',
'stroke-opacity':.55,'stroke-dasharray':'2 2.5'});put(e,'title',{},m[1]+', step '+m[0])});
var smoothed=smooth.checked&&points.length>=60;path(points,smoothed?.3:1,smoothed?1:1.6);
if(smoothed)path(mean(points),1,1.8);
if(points.length===1)put(svg,'circle',{cx:x(points[0][0]),cy:y(points[0][1]),r:3,fill:'var(--own)'});
put(svg,'text',{x:L,y:H-6},number(first));put(svg,'text',{x:W-R,y:H-6,'text-anchor':'end'},'step '+number(last));
var cross=put(svg,'line',{y1:T,y2:H-B,stroke:'var(--soft)',style:'display:none'});
svg.onpointermove=function(e){var box=svg.getBoundingClientRect();
var step=first+((e.clientX-box.left)*W/box.width-L)/(W-L-R)*
(last-first),near=points[0];points.forEach(function(p){if(Math.abs(p[0]-step)<Math.abs(near[0]-step))near=p});
cross.setAttribute('x1',x(near[0]));cross.setAttribute('x2',x(near[0]));cross.style.display='';
tip.textContent='step '+near[0].toLocaleString('en')+': '+number(near[1]);tip.style.display='block';
tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+'px';tip.style.top=(e.clientY+14)+'px'};
svg.onpointerleave=function(){cross.style.display='none';tip.style.display='none'}}
function all(){document.querySelectorAll('svg.curve').forEach(draw)}
[smooth,log].forEach(function(box){box.addEventListener('change',function(){
try{localStorage.setItem('polyview.'+box.id,box.checked?'1':'0')}catch(e){}all()})});all()})();
"""
