"""The style sheet and the script of a report. Both are part of the page: it opens without a network."""

from megatron_ds.monitor.report.chart import NUM_COLORS

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1c2128;--soft:#5a6472;--edge:#dde1e6;--grid:#e8ebef;
--c0:#1f5fa8;--c1:#c2570c;--c2:#1f7a5c;--c3:#7b3fa0;--c4:#8a6100;--c5:#b3265e;--c6:#0f7f96;--c7:#6b6f76;--bad:#c0182b;--good:#1f7a3d}
@media (prefers-color-scheme:dark){:root{--page:#14171c;--card:#1d2127;--text:#e6e9ee;--soft:#9aa5b3;--edge:#333a44;
--grid:#2a3038;--c0:#6aa9ee;--c1:#f0964e;--c2:#57c39b;--c3:#c08be0;--c4:#d9b24c;--c5:#f07aa6;--c6:#4cc3d9;--c7:#a9b0ba;--bad:#ff7582;--good:#63c784}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 10px}
.sub{color:var(--soft);margin:2px 0 18px;overflow-wrap:anywhere}
.status{color:var(--soft);font-weight:600}.status.done{color:var(--good)}.status.failed{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tile,figure,.card{background:var(--card);border:1px solid var(--edge);border-radius:8px}
.tile{padding:10px 14px}.tile span{display:block;color:var(--soft);font-size:13px}
.tile b{font-size:20px;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px}
@media (max-width:800px){.charts{grid-template-columns:minmax(0,1fr)}main{padding:16px 12px 32px}}
figure{margin:0;padding:12px 14px 8px}figcaption{font-weight:600}
.unit,.note{color:var(--soft);font-weight:400}
.legend{display:flex;flex-wrap:wrap;gap:0 16px;margin:0 0 6px;font-size:13px;color:var(--soft)}
.legend b{color:var(--text);font-variant-numeric:tabular-nums}
.key{overflow-wrap:anywhere}.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
.warn{color:var(--bad)}
output{display:block;min-height:20px;font-size:13px;text-align:right;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
text.y{text-anchor:end}text.x{text-anchor:middle}
@media (max-width:520px){svg text{font-size:16px}}
.grid{stroke:var(--grid)}.line{fill:none;stroke-width:1.6;stroke-linejoin:round}.band{opacity:.22}
.resumed{stroke:var(--soft);stroke-dasharray:3 3}.bad{stroke:var(--bad);stroke-width:1.5;fill:none}
.cursor{stroke:var(--soft);stroke-width:.8}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:6px 12px;border-bottom:1px solid var(--edge);vertical-align:top}
tr:last-child>*{border-bottom:0}th{color:var(--soft);font-weight:600}td.name+td,td.path{overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.name{white-space:nowrap;color:var(--soft);width:1%}
.bar{display:block;height:8px;min-width:80px;border-radius:4px;background:var(--grid)}
.bar i{display:block;height:8px;border-radius:4px;background:var(--c0)}
summary{cursor:pointer;padding:8px 14px;font-weight:600}
pre{margin:0;padding:4px 14px 12px;overflow-x:auto;font:13px/1.45 ui-monospace,"SFMono-Regular",Menlo,monospace}
""" + "".join(
    f".line.c{number}{{stroke:var(--c{number})}}.band.c{number},.dot.c{number}{{fill:var(--c{number})}}"
    f"i.c{number}{{background:var(--c{number})}}\n"
    for number in range(NUM_COLORS)
)

SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-points]")) {
  const {x: [low, high, begin, end], curves} = JSON.parse(figure.dataset.points);
  const svg = figure.querySelector("svg"), shown = figure.querySelector("output");
  const cursor = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  cursor.setAttribute("class", "cursor");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = low + (place - begin) / (end - begin) * (high - low);
    const far = point => Math.abs(point[0] - step);
    const near = points => points.reduce((best, one) => far(one) < far(best) ? one : best);
    const found = curves.filter(curve => curve.length > 1).map(([label, ...points]) => [label, ...near(points)]);
    if (!found.length) return;
    const at = found.reduce((best, one) => Math.abs(one[1] - step) < Math.abs(best[1] - step) ? one : best)[1];
    const text = number => number.toLocaleString("en");
    const other = one => one[1] === at ? "" : ` (step ${text(one[1])})`;
    shown.textContent = `step ${text(at)}: ` + found.map(one => `${one[0]} ${one[2]}${other(one)}`).join(", ");
    const drawn = begin + (at - low) / (high - low) * (end - begin);
    cursor.setAttribute("d", `M${drawn} 10V${svg.viewBox.baseVal.height - 24}`);
  });
  svg.addEventListener("pointerleave", () => { shown.textContent = ""; cursor.removeAttribute("d"); });
}
"""
