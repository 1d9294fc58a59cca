// The lists beside the picture: figures, pools with their buttons, changes, events.

import * as format from "./format.js";

const TILES = [
  { id: "ttft", title: "TTFT p95", big: (m) => format.seconds(m.last("traffic.ttft_p95_s")),
    small: (m) => `p50 ${format.seconds(m.last("traffic.ttft_p50_s"))} · p99 ${format.seconds(m.last("traffic.ttft_p99_s"))}` },
  { id: "tpot", title: "TPOT p95", big: (m) => format.seconds(m.last("traffic.tpot_p95_s")),
    small: (m) => `p50 ${format.seconds(m.last("traffic.tpot_p50_s"))} · p99 ${format.seconds(m.last("traffic.tpot_p99_s"))}` },
  { id: "requests", title: "Requests", big: (m) => format.perSecond(m.last("traffic.requests_per_s")),
    small: (m) => `${format.count(m.last("gateways.running"))} running · ${format.count(m.last("gateways.queued"))} queued` },
  { id: "tokens", title: "Tokens out", big: (m) => format.perSecond(m.last("engines.generation_tokens_per_s")),
    small: (m) => `${format.perSecond(m.last("engines.prompt_tokens_per_s"))} prompt` },
  { id: "accepted", title: "Acceptance length", big: (m) => format.tokens(m.last("engines.acceptance_length")),
    small: () => "tokens per decode step" },
  { id: "bytes", title: "KV moved", big: (m) => format.bytesPerSecond(m.last("engines.bytes_per_s")),
    small: (m) => `${format.count(m.last("engines.transfers_per_s"))} transfers/s · ${format.share(m.last("engines.held_share"))} held` },
  { id: "ready", title: "Replicas ready", big: (m) => `${m.last("engines.ready") ?? "–"}/${m.last("engines.desired") ?? "–"}`,
    small: (m) => troubles(m) },
];

function troubles(memory) {
  const refused = memory.last("gateways.refused_per_s");
  if (refused > 0) return `${format.perSecond(refused)} refused`;
  const failing = memory.now.failed.length;
  if (failing) return `${failing} failing`;
  const gateways = memory.last("gateways.replicas") ?? 0;
  return `${gateways} gateway${gateways === 1 ? "" : "s"}`;
}

export class Lists {
  // `scale(pool, replicas)`: somebody pressed a pool's button.
  constructor(memory, scale) {
    this.memory = memory;
    this.scale = scale;
    this.rows = new Map();
    this.tiles = TILES.map((tile) => {
      const box = make("div", "tile");
      box.id = `tile-${tile.id}`;
      const parts = [make("h3"), make("p", "big"), make("p", "small")];
      parts[0].textContent = tile.title;
      box.append(...parts);
      document.getElementById("figures").append(box);
      return { ...tile, parts };
    });
  }

  draw() {
    for (const { big, small, parts } of this.tiles) {
      parts[1].textContent = big(this.memory);
      parts[2].textContent = small(this.memory);
    }
    this.#pools();
    this.#changes();
    this.#events();
    this.#nodes();
  }

  #pools() {
    const { pools } = this.memory.now;
    const place = document.getElementById("pools");
    const names = pools.map((pool) => pool.name).join();
    if (this.names !== names) {
      this.names = names;
      this.rows = new Map(pools.map((pool) => [pool.name, this.#poolRow(pool.name)]));
      place.replaceChildren(...[...this.rows.values()].map((row) => row.item));
    }
    for (const pool of pools) {
      const row = this.rows.get(pool.name);
      const last = (field) => this.memory.last(`pool.${pool.name}.${field}`);
      const decodes = pool.role !== "prefill";
      row.badge.className = `badge ${pool.role}`;
      row.badge.textContent = pool.role;
      row.count.textContent = `${pool.ready}/${pool.desired}`;
      row.count.classList.toggle("short", pool.ready !== pool.desired);
      row.less.disabled = pool.desired === 0;
      const waiting = last("waiting");
      row.facts.textContent = [
        `${format.count(last("running"))} running${waiting ? `, ${format.count(waiting)} waiting` : ""}`,
        `KV ${format.share(last("kv_usage"))}`,
        `${format.count(last(decodes ? "generation_tokens_per_s" : "prompt_tokens_per_s"))} tokens/s`,
        decodes && last("acceptance_length") !== null ? `accepts ${format.tokens(last("acceptance_length"))}` : "",
      ].filter(Boolean).join(" · ");
    }
  }

  #poolRow(name) {
    const item = make("li", "pool-row");
    item.dataset.pool = name;
    const head = make("p", "head");
    const badge = make("span", "badge");
    const title = make("b");
    title.textContent = name;
    head.append(title, badge);
    const facts = make("p", "facts");
    const steps = make("div", "steps");
    const [less, count, more] = [make("button"), make("output"), make("button")];
    for (const [button, sign, word, by] of [[less, "−", "Fewer", -1], [more, "+", "More", 1]]) {
      button.type = "button";
      button.textContent = sign;
      button.setAttribute("aria-label", `${word} replicas of ${name}`);
      button.addEventListener("click", () => {
        const pool = this.memory.now.pools.find((one) => one.name === name);
        this.scale(pool, Math.max(0, pool.desired + by));
      });
    }
    count.setAttribute("aria-label", `Ready and wanted replicas of ${name}`);
    steps.append(less, count, more);
    item.append(head, steps, facts);
    return { item, badge, facts, count, less };
  }

  #changes() {
    const { changes, at_s: now } = this.memory.now;
    const signature = JSON.stringify(changes.map((c) => [c.id, c.state, c.waits_for, c.steps.length]));
    if (signature === this.changesDrawn) return;
    this.changesDrawn = signature;
    const items = changes.toReversed().slice(0, 8).map((change) => {
      const item = make("li", `change is-${change.state}`);
      item.dataset.change = change.id;
      const head = make("p", "head");
      const [what, state] = [make("b"), make("span", "badge")];
      what.textContent = change.what;
      state.textContent = change.state;
      head.append(what, state);
      const facts = make("p", "facts");
      facts.textContent = change.state === "running"
        ? (change.waits_for || change.steps.at(-1)?.text || "begun")
        : `${change.why || "done"}, after ${format.span((change.ended_at_s ?? now) - change.asked_at_s)}, asked by ${change.asked_by}`;
      item.append(head, facts);
      return item;
    });
    document.getElementById("changes").replaceChildren(...(items.length ? items
      : [note("Nothing was changed yet.")]));
  }

  #events() {
    const newest = this.memory.events.at(-1)?.seq ?? 0;
    if (newest === this.eventsDrawn) return;
    this.eventsDrawn = newest;
    const items = this.memory.events.toReversed().map((event) => {
      const item = make("li");
      item.dataset.kind = event.kind;
      const time = make("time");
      time.textContent = format.clock(event.at_s);
      const text = make("span");
      text.textContent = event.text;
      item.append(time, text);
      return item;
    });
    document.getElementById("events").replaceChildren(...(items.length ? items
      : [note("Nothing has happened yet.")]));
  }

  #nodes() {
    const { nodes, failed } = this.memory.now;
    const parts = nodes.map((node) =>
      `${node.address || node.id.slice(0, 8)} (${node.is_drained ? "drained" : node.workers})`);
    const shown = parts.length > 8 ? `${parts.length} nodes` : `Workers by node: ${parts.join(", ")}`;
    const faults = failed.map((slot) => `${slot.worker} failed: ${slot.why}`);
    document.getElementById("nodes").textContent = [parts.length ? shown : "", ...faults]
      .filter(Boolean).join(". ");
  }
}

function make(name, kind) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  return made;
}

function note(text) {
  const made = make("li", "hint");
  made.textContent = text;
  return made;
}
