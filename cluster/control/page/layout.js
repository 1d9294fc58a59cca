// Where things stand in the picture: islands, in them pools, in them workers, between them links.
// In: what the API told, and the width in pixels. Out: boxes and points. Pure.
//
//   wide      prefill and mixed pools left, decode pools right, links across
//   narrow    all pools below each other, links along the left edge

const GAP = 14;
const HEAD = 46;
const ISLAND_HEAD = 30;
const WIDE = 560;
const MIDDLE = 150;
const GUTTER = 30;
const MANY = 24;

export function layout(islands, pools, workers, links, width) {
  const isWide = width >= WIDE;
  const byPool = Map.groupBy(workers, (worker) => worker.pool);
  const boxes = { islands: [], pools: new Map(), workers: new Map(), links: [], width, isWide };
  let y = 0;
  for (const island of withLeaving(islands, pools, workers)) {
    const own = island.pools.map((name) => pools.find((pool) => pool.name === name) ?? leaving(name));
    const top = y + ISLAND_HEAD;
    const columns = isWide ? acrossColumns(own, width) : [{ pools: own, x: GAP + GUTTER,
      width: width - 2 * GAP - GUTTER }];
    let bottom = top;
    for (const column of columns) {
      let at = top;
      for (const pool of column.pools) {
        const box = poolBox(pool, byPool.get(pool.name) ?? [], column.x, at, column.width, boxes);
        at += box.height + GAP;
      }
      column.bottom = at;
      bottom = Math.max(bottom, at);
    }
    // The shorter column stands in the middle of the longer one.
    for (const column of columns) move(column, (bottom - column.bottom) / 2, byPool, boxes);
    boxes.islands.push({ ...island, x: 0.5, y: y + 0.5, width: width - 1, height: bottom - y - 1 });
    y = bottom + GAP;
  }
  boxes.links = links
    .filter((link) => boxes.pools.has(link.prefill) && boxes.pools.has(link.decode))
    .map((link, at) => ({ ...link, ...way(link, at, boxes) }));
  boxes.height = Math.max(60, y - GAP + 1);
  return boxes;
}

// Pools that the topology has no more, while their workers finish.
function withLeaving(islands, pools, workers) {
  const known = new Set(pools.map((pool) => pool.name));
  const left = [...new Set(workers.map((w) => w.pool))].filter((name) => !known.has(name));
  return left.length ? [...islands, { name: "leaving", connector: "", pools: left }] : islands;
}

const leaving = (name) => ({ name, role: "mixed", hardware: "", engine: "", desired: 0, ready: 0 });

function acrossColumns(pools, width) {
  const right = pools.filter((pool) => pool.role === "decode");
  const left = pools.filter((pool) => pool.role !== "decode");
  const inner = width - 2 * GAP;
  if (!left.length || !right.length) return [{ pools, x: GAP, width: inner }];
  const column = (inner - MIDDLE) / 2;
  return [{ pools: left, x: GAP, width: column },
    { pools: right, x: GAP + column + MIDDLE, width: column }];
}

function poolBox(pool, workers, x, y, width, boxes) {
  const tile = workers.length > MANY ? { width: 24, height: 20, gap: 4 }
    : { width: 50, height: 36, gap: 6 };
  const columns = Math.max(1, Math.floor((width - 2 * GAP + tile.gap) / (tile.width + tile.gap)));
  workers.forEach((worker, at) => {
    boxes.workers.set(worker.id, {
      worker,
      x: x + GAP + (at % columns) * (tile.width + tile.gap),
      y: y + HEAD + Math.floor(at / columns) * (tile.height + tile.gap),
      width: tile.width,
      height: tile.height,
      isSmall: tile.width < 40,
    });
  });
  const rows = Math.max(1, Math.ceil(workers.length / columns));
  const box = { pool, x, y, width, height: HEAD + rows * (tile.height + tile.gap) + 8 };
  boxes.pools.set(pool.name, box);
  return box;
}

function move(column, by, byPool, boxes) {
  for (const pool of column.pools) {
    boxes.pools.get(pool.name).y += by;
    for (const worker of byPool.get(pool.name) ?? []) boxes.workers.get(worker.id).y += by;
  }
}

function way(link, at, boxes) {
  const from = boxes.pools.get(link.prefill);
  const to = boxes.pools.get(link.decode);
  if (boxes.isWide && to.x > from.x + from.width) {
    const [x1, y1] = [from.x + from.width, from.y + from.height / 2];
    const [x2, y2] = [to.x, to.y + to.height / 2];
    const bend = (x2 - x1) / 2;
    return { path: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`,
      label: { x: (x1 + x2) / 2, y: (y1 + y2) / 2 } };
  }
  // Around the outside; several next to each other.
  const edge = Math.min(from.x, to.x);
  const x = edge - 8 - (at % 3) * 6;
  const [y1, y2] = [from.y + from.height / 2, to.y + to.height / 2 + 6];
  return { path: `M${from.x} ${y1}H${x}V${y2}H${to.x}`, label: null };
}
