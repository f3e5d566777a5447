// The curves of one run: fetched every second or two while somebody looks, drawn with uPlot.
const box = document.getElementById("charts");
const labels = JSON.parse(box.dataset.labels);
const charts = new Map();
const AXES = ["seq_id", "step", "time", "total_tokens"];
const FIRST = ["loss", "reward", "learning_rate", "tokens"];
const EVERY_MS = 1500;
let version = -1;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function words(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString() : Number(value.toPrecision(4)).toString();
}

function options(width, name) {
  const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false } };
  const stroke = color(`--curve-${1 + (rank(name) % 4)}`);
  return {
    width,
    height: 180,
    legend: { show: false },
    scales: { x: { time: false } },
    axes: [{ ...axis, size: 30 }, { ...axis, size: 60, values: (_, ticks) => ticks.map(words) }],
    series: [{}, { stroke, width: 2, spanGaps: true, points: { size: 5 } }],
  };
}

function figure(name) {
  const element = document.createElement("figure");
  element.className = "chart";
  element.dataset.name = name;
  const caption = document.createElement("figcaption");
  const title = document.createElement("span");
  title.textContent = labels[name] || name;
  const latest = document.createElement("output");
  caption.append(title, latest);
  element.append(caption);
  const later = [...charts.keys()].find((other) => rank(other) > rank(name));
  box.insertBefore(element, later ? charts.get(later).element : null);
  return { element, latest, plot: null };
}

function rank(name) {
  const place = FIRST.indexOf(name);
  return place < 0 ? FIRST.length : place;
}

function draw(name, xs, ys) {
  if (!ys.some((value) => value !== null)) return;
  if (!charts.has(name)) charts.set(name, figure(name));
  const chart = charts.get(name);
  const last = ys.findLast((value) => value !== null);
  chart.latest.textContent = words(last);
  chart.element.setAttribute("role", "img");
  chart.element.setAttribute("aria-label", `${labels[name] || name}: ${words(last)}`);
  chart.data = [xs, ys];
  if (chart.plot) {
    chart.plot.setData(chart.data);
  } else {
    const width = chart.element.clientWidth - 20;
    chart.plot = new uPlot(options(width, name), chart.data, chart.element);
  }
}

function redraw() {
  charts.forEach((chart, name) => {
    chart.plot.destroy();
    chart.plot = new uPlot(options(chart.element.clientWidth - 20, name), chart.data, chart.element);
  });
}

function show(found) {
  const status = document.getElementById("status");
  if (status.textContent !== found.status) status.textContent = found.status;
  status.className = `badge ${found.state}`;
  if (!found.steps) return;
  version = found.version;
  document.getElementById("no-steps").hidden = found.num_steps > 0;
  document.getElementById("num-steps").textContent = found.num_steps.toLocaleString();
  document.getElementById("total-tokens").textContent = found.total_tokens.toLocaleString();
  const losses = (found.steps.loss || []).filter((value) => value !== null);
  document.getElementById("last-loss").textContent = words(losses.at(-1));
  for (const columns of [found.steps, found.reported]) {
    for (const [name, values] of Object.entries(columns)) {
      if (!AXES.includes(name)) draw(name, columns.step, values);
    }
  }
}

async function look() {
  if (document.hidden) return;
  const answer = await fetch(`${box.dataset.url}?version=${version}`);
  if (answer.status === 401) location.reload();
  if (answer.ok) show(await answer.json());
}

look().catch(() => {});
setInterval(() => look().catch(() => {}), EVERY_MS);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) {
    width = innerWidth;
    redraw();
  }
});
