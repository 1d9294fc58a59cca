// What the charts draw: Prometheus' points, as far as it has any, and after them this tab's own.

const EVERY_MS = 10000;
const NOTHING = { at_s: [], series: {} };

export class Past {
  constructor(memory) {
    this.memory = memory;
    this.columns = NOTHING;
    this.why = "";
    this.dueMs = 0;
    this.atS = [];
    this.from = 0;
  }

  get now() {
    return this.memory.now;
  }

  get scaling() {
    return this.memory.scaling;
  }

  get isThere() {
    return this.columns.at_s.length > 0;
  }

  // Whether it is time to ask again.
  get isDue() {
    return Date.now() >= this.dueMs;
  }

  asking() {
    this.dueMs = Infinity;
  }

  take({ source, why, step_s: stepS, columns }) {
    this.columns = source ? columns : NOTHING;
    this.why = why;
    this.dueMs = Date.now() + Math.max(EVERY_MS, stepS * 1000);
    this.join();
  }

  // The control API had no answer. What was there is still true.
  miss() {
    this.dueMs = Date.now() + EVERY_MS;
  }

  join() {
    const newest = this.columns.at_s.at(-1) ?? 0;
    const from = this.memory.atS.findIndex((atS) => atS > newest);
    this.from = from < 0 ? this.memory.atS.length : from;
    this.atS = [...this.columns.at_s, ...this.memory.atS.slice(this.from)];
  }

  column(name) {
    const before = this.columns.series[name] ?? new Array(this.columns.at_s.length).fill(null);
    return [...before, ...this.memory.column(name).slice(this.from)];
  }

  names(pattern) {
    const before = Object.keys(this.columns.series).filter((name) => pattern.test(name));
    return [...new Set([...this.memory.names(pattern), ...before])];
  }
}
