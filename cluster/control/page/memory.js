// What this tab has been told: columns grow by what is new, rows of workers are replaced.

const KEPT_S = 900;
const EVENTS_KEPT = 200;

export class Memory {
  constructor() {
    this.since = 0;
    this.eventsAfter = 0;
    this.atS = [];
    this.series = new Map();
    this.workers = new Map();
    this.events = [];
    this.now = null;
    this.scaling = null;
  }

  // Whether there are new points.
  take({ live, scaling }) {
    this.now = live;
    this.scaling = scaling;
    if (live.is_whole) this.workers.clear();
    for (const worker of live.workers) this.workers.set(worker.id, worker);
    for (const id of live.gone) this.workers.delete(id);
    const known = new Set(this.events.map((event) => event.seq));
    this.events.push(...live.events.filter((event) => !known.has(event.seq)));
    this.events = this.events.slice(-EVENTS_KEPT);
    this.eventsAfter = this.events.at(-1)?.seq ?? this.eventsAfter;
    this.since = live.seq;
    return this.#grow(live.columns);
  }

  column(name) {
    return this.series.get(name) ?? new Array(this.atS.length).fill(null);
  }

  last(name) {
    return this.series.get(name)?.at(-1) ?? null;
  }

  names(pattern) {
    return [...this.series.keys()].filter((name) => pattern.test(name));
  }

  // A restarted controller has forgotten; what it says later is put behind what was there.
  #grow({ at_s: atS, series }) {
    const had = this.atS.length;
    const newest = this.atS.at(-1) ?? 0;
    const from = atS.findIndex((value) => value > newest);
    if (from < 0) return false;
    const fresh = atS.slice(from);
    this.atS.push(...fresh);
    for (const name of new Set([...this.series.keys(), ...Object.keys(series)])) {
      const column = this.series.get(name) ?? new Array(had).fill(null);
      column.push(...(series[name]?.slice(from) ?? fresh.map(() => null)));
      this.series.set(name, column);
    }
    const old = this.atS.findIndex((value) => value >= this.atS.at(-1) - KEPT_S);
    if (old > 0) {
      this.atS.splice(0, old);
      for (const [name, column] of this.series) {
        column.splice(0, old);
        if (column.every((value) => value === null)) this.series.delete(name);
      }
    }
    return true;
  }
}
