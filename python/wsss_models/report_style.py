"""The style sheet of a report: light and dark, nothing to load."""

STYLE = """
:root{--ink:#1b1d22;--soft:#666b76;--paper:#fff;--card:#f6f7f9;--line:#e1e4e9;--bar:#d7e6fb;--best:#0a6b3d;--link:#0b5cc4;
--c0:#1f6fd6;--c1:#d9622b;--c2:#22935a;--c3:#9a4fc9;--c4:#c23a5e;--c5:#8a7a12}
@media (prefers-color-scheme:dark){:root{--ink:#e7e9ee;--soft:#9aa1ae;--paper:#14161a;--card:#1d2026;--line:#31353d;
--bar:#23426b;--best:#62d394;--link:#7db4ff;--c0:#6aa9ff;--c1:#ff9a66;--c2:#5fd08f;--c3:#c592f0;--c4:#ff7d9c;--c5:#d8c34f}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:44px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:26px 0 10px}
h4,h5{font-size:.95rem;margin:0 0 8px;overflow-wrap:anywhere}
.section{margin:20px 0 10px}
p{margin:0 0 10px}
.soft{color:var(--soft);font-weight:400}
header p{margin:0;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:16px}
a{color:var(--link);text-decoration:none}
a:hover{text-decoration:underline}
.notes{margin:20px 0 0;padding:10px 16px 10px 32px;background:var(--card);border-left:3px solid var(--c1);
border-radius:4px;font-size:.9rem;overflow-wrap:anywhere}
.wide,.strip{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.92rem}
th,td{padding:6px 14px 6px 8px;text-align:left;border-bottom:1px solid var(--line);max-width:26em;
overflow-wrap:break-word}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500}
.number{font-variant-numeric:tabular-nums;min-width:6.5em;white-space:nowrap}
.bar{background:linear-gradient(var(--bar),var(--bar)) no-repeat 0 50%/calc(var(--share)*100%) 78%}
.best{color:var(--best);font-weight:700}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:16px}
figure{margin:0}
.chart{background:var(--card);border-radius:10px;padding:14px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:10.5px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}
polyline{fill:none;stroke:var(--k);stroke-width:2;stroke-linejoin:round}
polyline.raw{stroke-width:1;opacity:.3}
circle{fill:var(--k)}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}.c5{--k:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:8px 0 0;padding:0;font-size:.88rem}
.legend li{overflow-wrap:anywhere}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.45em;border-radius:3px;background:var(--k)}
.case{background:var(--card);border-radius:10px;padding:14px;margin:0 0 14px}
.strip{display:flex;gap:10px;padding-bottom:4px}
.strip figure{flex:1 0 150px;max-width:230px}
.strip img,.none{display:block;width:100%;height:auto;border-radius:6px}
.none{display:grid;place-items:center;min-height:110px;padding:8px;border:1px dashed var(--line);color:var(--soft);
font-size:.85rem;text-align:center}
.thumbs{display:flex;flex-wrap:wrap;gap:6px;margin:0 0 14px}
.thumbs img{border-radius:4px}
details h5{margin-top:10px}
figcaption{margin-top:4px;color:var(--soft);font-size:.82rem}
.score{display:inline-block;margin:0 6px;padding:0 8px;border-radius:99px;background:var(--bar);font-weight:600;
font-variant-numeric:tabular-nums}
.run{margin:12px 0 6px;font-size:.9rem;font-weight:600;overflow-wrap:anywhere}
details{margin:0 0 8px;padding:10px 14px;background:var(--card);border-radius:10px}
summary{cursor:pointer;overflow-wrap:anywhere}
pre{margin:12px 0 0;overflow-x:auto;font:.82rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media (max-width:600px){main{padding:18px 12px 40px}h1{font-size:1.5rem}.strip figure{flex-basis:62vw}}
@media print{.case,.chart{break-inside:avoid}}
"""
