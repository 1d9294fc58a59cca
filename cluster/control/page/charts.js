// The charts, by uPlot. A panel says which columns it draws and how its numbers are written; lines
// are made anew when the pools are others, and when light turns to dark.

import * as format from "./format.js";

const HEIGHT = 150;
const SHADES = ["--line-1", "--line-2", "--line-3"];
const MANY = ["--many-1", "--many-2", "--many-3", "--many-4", "--many-5", "--many-6"];

// Between two marks of an axis: seconds of time, and bytes.
const TIMES = [10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600];
const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power);

const percentiles = (prefix) => (memory) =>
  ["p50", "p95", "p99"].map((name, at) => ({
    label: name, column: `${prefix}_${name}_s`, colour: SHADES[at], width: at === 2 ? 1.2 : 1.8,
  }));

const perPool = (field) => (memory) =>
  (memory.now?.pools ?? [])
    .map((pool) => ({ label: pool.name, column: `pool.${pool.name}.${field}` }))
    .filter((line) => memory.column(line.column).some((value) => value !== null && value !== 0))
    .map((line, at) => ({ ...line, colour: MANY[at % MANY.length], width: 1.8 }));

const fixed = (...lines) => () =>
  lines.map(([label, column, colour]) => ({ label, column, colour, width: 1.8 }));

const roles = (memory) =>
  memory.names(/^role\..*\.ready$/).flatMap((column) => {
    const role = column.split(".")[1];
    return [
      { label: `${role}, ready`, column, colour: `--${role}-line`, width: 2.2, steps: true },
      { label: "wanted", column: `role.${role}.desired`, colour: `--${role}-line`, width: 1.2,
        steps: true, dash: [4, 4] },
    ];
  });

const target = (field) => (memory) => {
  const found = (memory.scaling?.targets ?? []).map((one) => one[field]).filter((value) => value);
  return found.length ? Math.min(...found) : null;
};

export const PANELS = [
  { id: "ttft", title: "Time to first token", write: format.seconds,
    lines: percentiles("traffic.ttft"), target: target("ttft_target_s") },
  { id: "tpot", title: "Time per output token", write: format.seconds,
    lines: percentiles("traffic.tpot"), target: target("tpot_target_s") },
  { id: "tokens", title: "Tokens per second", write: format.count,
    lines: fixed(["prompt", "engines.prompt_tokens_per_s", "--prefill-line"],
      ["generated", "engines.generation_tokens_per_s", "--decode-line"]) },
  { id: "requests", title: "Requests in hand", write: format.count,
    lines: fixed(["running", "gateways.running", "--many-1"],
      ["queued at the gateway", "gateways.queued", "--many-2"],
      ["waiting in engines", "engines.waiting", "--many-3"]) },
  { id: "accepted", title: "Acceptance length", write: format.tokens, least: 1,
    lines: perPool("acceptance_length") },
  { id: "bytes", title: "KV moved", write: format.bytesPerSecond, steps: BINARY,
    lines: perPool("bytes_per_s") },
  { id: "held", title: "Prompt KV that decode held already", write: format.share, most: 1,
    lines: perPool("held_share") },
  { id: "replicas", title: "Replicas by role", write: format.whole, least: 0, room: 1,
    lines: roles },
];

export class Charts {
  constructor(place, memory) {
    this.memory = memory;
    this.spanS = 300;
    this.panels = PANELS.map((panel) => new Chart(panel, place, this));
    const fit = new ResizeObserver(() => this.panels.forEach((chart) => chart.fit()));
    fit.observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.panels.forEach((chart) => chart.rebuild());
    });
  }

  draw() {
    this.panels.forEach((chart) => chart.draw());
  }
}

class Chart {
  constructor(panel, place, charts) {
    this.panel = panel;
    this.charts = charts;
    this.signature = "";
    this.lines = [];
    this.root = document.createElement("figure");
    this.root.className = "card chart";
    this.root.id = `chart-${panel.id}`;
    this.root.innerHTML = '<figcaption><h3></h3><ul class="values"></ul></figcaption><div></div>';
    this.root.querySelector("h3").textContent = panel.title;
    this.values = this.root.querySelector("ul");
    this.place = this.root.querySelector("div");
    place.append(this.root);
  }

  rebuild() {
    this.signature = "";
    this.draw();
  }

  draw() {
    const { memory } = this.charts;
    this.lines = this.panel.lines(memory);
    const goal = this.panel.target?.(memory) ?? null;
    if (goal !== null) {
      this.lines.push({ label: "target", value: goal, colour: "--bad", width: 1.2, dash: [6, 4] });
    }
    const signature = JSON.stringify(this.lines);
    if (signature !== this.signature) {
      this.signature = signature;
      this.#make();
    }
    const columns = this.lines.map((line) =>
      line.column ? memory.column(line.column) : memory.atS.map(() => line.value));
    this.columns = columns;
    this.plot.setData([memory.atS, ...columns]);
    this.#write(this.plot.cursor.idx);
  }

  fit() {
    const width = this.place.clientWidth;
    if (this.plot && width > 0) this.plot.setSize({ width, height: HEIGHT });
  }

  #make() {
    this.plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--quiet"),
      font: `11px ${style.getPropertyValue("--font")}`,
      grid: { stroke: colour("--grid"), width: 1 },
      ticks: { show: false },
    };
    const { panel } = this;
    this.plot = new uPlot({
      width: this.place.clientWidth || 300,
      height: HEIGHT,
      padding: [8, 6, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "pdcluster" }, y: false, drag: { x: false, y: false },
        points: { size: 5 } },
      scales: {
        x: { range: () => this.#range() },
        y: { range: (_, low, high) => this.#bounds(high) },
      },
      axes: [
        { ...axis, space: 58, gap: 4, size: 26, incrs: TIMES,
          values: (_, ticks) => ticks.map((atS) => format.clock(atS).slice(0, atS % 60 ? 8 : 5)) },
        { ...axis, space: 34, gap: 4, size: axisSize, incrs: panel.steps,
          values: (_, ticks) => ticks.map((value) => format.tick(panel.write(value))) },
      ],
      series: [{}, ...this.lines.map((line) => ({
        label: line.label,
        stroke: colour(line.colour),
        width: line.width,
        dash: line.dash,
        paths: line.steps ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: false },
      }))],
      hooks: { setCursor: [(plot) => this.#write(plot.cursor.idx)] },
    }, [[], ...this.lines.map(() => [])], this.place);
    this.values.replaceChildren(...this.lines.map((line) => {
      const item = document.createElement("li");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = colour(line.colour);
      item.append(swatch, `${line.label} `, document.createElement("b"));
      return item;
    }));
  }

  // The values under the cursor, or the newest.
  #write(index) {
    const items = this.values.children;
    this.columns?.forEach((column, at) => {
      const value = column[index ?? column.length - 1];
      if (items[at]) items[at].lastChild.textContent = this.panel.write(value);
    });
    this.root.classList.toggle("empty", !this.columns?.some((c) => c.some((v) => v !== null)));
  }

  #range() {
    const newest = this.charts.memory.atS.at(-1) ?? Date.now() / 1000;
    return [newest - this.charts.spanS, newest];
  }

  #bounds(high) {
    const { least = 0, most, room = 0 } = this.panel;
    if (most) return [least, most];
    return [least, high > least ? least + (high - least) * 1.15 + room : least + 1];
  }
}

// As wide as the longest of its numbers.
function axisSize(plot, values) {
  const longest = Math.max(3, ...(values ?? []).map((value) => value.length));
  return Math.ceil(longest * 6.2) + 10;
}
