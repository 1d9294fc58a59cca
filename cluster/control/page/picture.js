// The cluster as a picture (SVG). Elements are kept from one drawing to the next as long as the same
// things are there, so that focus and movement go on. One tab stop; arrows go from worker to worker.

import * as format from "./format.js";
import { layout } from "./layout.js";

const SVG = "http://www.w3.org/2000/svg";
const MARKS = { starting: "…", loading: "…", warming: "…", hung: "!", changing: "⇄", draining: "↓",
  stopped: "×", failed: "×" };

export class Picture {
  // `open(worker)`: somebody wants to see that one.
  constructor(place, open) {
    this.place = place;
    this.open = open;
    this.signature = "";
    this.current = "";
    this.svg = element("svg", { class: "cluster", role: "group", "aria-label": "The cluster" });
    place.append(this.svg);
    new ResizeObserver(() => this.memory && this.draw(this.memory)).observe(place);
    this.svg.addEventListener("keydown", (event) => this.#key(event));
  }

  draw(memory) {
    this.memory = memory;
    const { islands, pools, links } = memory.now;
    const width = Math.floor(this.place.clientWidth);
    if (width <= 0) return;
    const workers = [...memory.workers.values()]
      .sort((a, b) => a.pool.localeCompare(b.pool) || indexOf(a) - indexOf(b));
    this.boxes = layout(islands, pools, workers, links, width);
    const signature = JSON.stringify([
      width, this.boxes.height, islands, pools.map((pool) => pool.name),
      workers.map((worker) => worker.id), links.map((link) => [link.prefill, link.decode]),
    ]);
    if (signature !== this.signature) {
      this.signature = signature;
      this.#build();
    }
    this.#update();
  }

  focus() {
    (this.workers.get(this.current) ?? this.workers.values().next().value)?.group.focus();
  }

  #build() {
    const hadFocus = this.svg.contains(document.activeElement);
    const { boxes } = this;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${boxes.width} ${boxes.height}`);
    this.svg.setAttribute("width", boxes.width);
    this.svg.setAttribute("height", boxes.height);
    this.pools = new Map();
    this.workers = new Map();
    this.links = new Map();
    for (const island of boxes.islands) {
      this.svg.append(
        element("rect", { ...rect(island), rx: 14, class: "island" }),
        text(island.x + 16, island.y + 20, "island-name", island.name),
        text(island.x + island.width - 16, island.y + 20, "island-via end",
          island.connector ? `KV over ${island.connector}` : ""),
      );
    }
    for (const link of boxes.links) this.links.set(linkKey(link), this.#buildLink(link));
    for (const box of boxes.pools.values()) this.pools.set(box.pool.name, this.#buildPool(box));
    for (const [id, box] of boxes.workers) this.workers.set(id, this.#buildWorker(id, box));
    if (!this.workers.has(this.current)) this.current = this.workers.keys().next().value ?? "";
    this.workers.get(this.current)?.group.setAttribute("tabindex", "0");
    if (hadFocus) this.focus();
  }

  #buildLink(link) {
    const group = element("g", { class: "link" });
    const line = element("path", { d: link.path, class: "line" });
    const moving = element("path", { d: link.path, class: "moving" });
    const title = element("title");
    group.append(title, line, moving);
    let label = null;
    if (link.label) {
      label = { bytes: text(link.label.x, link.label.y - 10, "link-bytes middle", ""),
        requests: text(link.label.x, link.label.y + 19, "link-requests middle", "") };
      group.append(label.bytes, label.requests);
    }
    this.svg.append(group);
    return { group, line, moving, title, label };
  }

  #buildPool({ pool, x, y, width, height }) {
    const group = element("g", { class: `pool ${pool.role}` });
    const count = text(x + width - 14, y + 21, "pool-count end", "");
    const flow = text(x + width - 14, y + 37, "pool-what end", "");
    const what = [pool.hardware, pool.engine].filter(Boolean).join(" · ");
    group.append(
      element("rect", { x, y, width, height, rx: 10, class: "pool-box" }),
      element("rect", { x, y: y + 10, width: 3, height: height - 20, rx: 1.5, class: "pool-edge" }),
      text(x + 14, y + 21, "pool-name", pool.name),
      text(x + 14, y + 37, "pool-what", `${pool.role}${what ? ` · ${what}` : ""}`),
      count, flow,
    );
    this.svg.append(group);
    return { group, count, flow };
  }

  #buildWorker(id, { worker, x, y, width, height, isSmall }) {
    const group = element("g", { class: "worker", tabindex: "-1", role: "button",
      "data-worker": worker.name, transform: `translate(${x} ${y})` });
    const title = element("title");
    const fill = element("rect", { class: "fill", width: 0, height, rx: isSmall ? 4 : 7 });
    const frame = element("rect", { class: "frame", width, height, rx: isSmall ? 4 : 7 });
    const label = text(isSmall ? width / 2 : 8, isSmall ? 14 : 16,
      isSmall ? "mark middle" : "index", "");
    const load = text(width - 7, height - 7, "load end", "");
    group.append(title, fill, frame, label, ...(isSmall ? [] : [load]));
    group.addEventListener("click", () => this.open(id));
    group.addEventListener("focus", () => this.#stopAt(id));
    this.svg.append(group);
    return { group, title, fill, label, load, width, isSmall };
  }

  #update() {
    for (const link of this.boxes.links) this.#updateLink(link);
    for (const { pool } of this.boxes.pools.values()) {
      const { group, count, flow } = this.pools.get(pool.name);
      count.textContent = `${pool.ready}/${pool.desired}`;
      group.classList.toggle("short", pool.ready !== pool.desired);
      const arriving = this.boxes.links.filter((link) => link.decode === pool.name);
      const isShown = arriving.some((link) => !link.label);
      const perS = arriving.reduce((sum, link) => sum + link.bytes_per_s, 0);
      flow.textContent = isShown && perS > 0 ? `← ${format.bytesPerSecond(perS)}` : "";
    }
    for (const [id, { worker }] of this.boxes.workers) this.#updateWorker(id, worker);
  }

  #updateLink(link) {
    const { group, line, moving, title, label } = this.links.get(linkKey(link));
    const isMoving = link.is_open && link.bytes_per_s > 0;
    group.classList.toggle("closed", !link.is_open);
    group.classList.toggle("is-moving", isMoving);
    // By the logarithm: from 1 KiB/s to 100 GiB/s are eight powers of ten.
    const width = isMoving ? 2 + 0.5 * Math.max(0, Math.log10(link.bytes_per_s) - 3) : 1.5;
    line.setAttribute("stroke-width", width + 2);
    moving.setAttribute("stroke-width", width);
    const name = `${link.prefill} → ${link.decode}`;
    title.textContent = link.is_open
      ? `${name}: ${format.bytesPerSecond(link.bytes_per_s)}, ${format.count(link.requests_per_s)} requests/s`
      : `${name} is closed: ${link.mismatches.join("; ")}`;
    if (label) {
      label.bytes.textContent = link.is_open ? format.bytesPerSecond(link.bytes_per_s) : "closed";
      label.requests.textContent = `${format.count(link.requests_per_s)} req/s`;
    }
  }

  #updateWorker(id, worker) {
    const { group, title, fill, label, load, width, isSmall } = this.workers.get(id);
    const isReady = worker.state === "ready";
    group.setAttribute("class", `worker ${worker.role} is-${worker.state}`);
    fill.setAttribute("width", isReady ? Math.max(0, Math.min(1, worker.kv_usage)) * width : 0);
    const mark = MARKS[worker.state] ?? "";
    label.textContent = isSmall ? mark : `${indexOf(worker)}${mark ? ` ${mark}` : ""}`;
    load.textContent = isReady ? format.count(worker.running + worker.waiting) : "";
    const said = `${worker.name}, ${worker.role}, ${worker.state}`;
    const facts = isReady
      ? `${worker.running} running, ${worker.waiting} waiting, KV ${format.share(worker.kv_usage)}`
      : worker.message;
    title.textContent = facts ? `${said}: ${facts}` : said;
    group.setAttribute("aria-label", title.textContent);
  }

  #stopAt(id) {
    this.workers.get(this.current)?.group.setAttribute("tabindex", "-1");
    this.current = id;
    this.workers.get(id)?.group.setAttribute("tabindex", "0");
  }

  #key(event) {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.stopPropagation();
      this.open(this.current);
      return;
    }
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!way) return;
    event.preventDefault();
    const next = this.#beside(...way);
    if (next) this.workers.get(next).group.focus();
  }

  // The nearest worker that way; what is off to the side counts double.
  #beside(dx, dy) {
    const here = this.boxes.workers.get(this.current);
    let best = null;
    for (const [id, box] of this.boxes.workers) {
      const ahead = (box.x - here.x) * dx + (box.y - here.y) * dy;
      const aside = Math.abs((box.x - here.x) * dy) + Math.abs((box.y - here.y) * dx);
      const cost = ahead + 2 * aside;
      if (ahead > 1 && (best === null || cost < best.cost)) best = { id, cost };
    }
    return best?.id;
  }
}

const linkKey = (link) => `${link.prefill}>${link.decode}`;
const indexOf = (worker) => Number(worker.name.split("/")[1]);
const rect = ({ x, y, width, height }) => ({ x, y, width, height });

function element(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(x, y, kind, content) {
  const made = element("text", { x, y, class: kind });
  made.textContent = content;
  return made;
}
