// Numbers as people read them. A value that is not known is a dash.

const NONE = "–";

const known = (write) => (value) => (value === null || value === undefined ? NONE : write(value));

function digits(value, count = 3) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 100) return value.toFixed(0);
  return size >= 10 ? value.toFixed(Math.max(0, count - 2)) : value.toFixed(Math.max(0, count - 1));
}

export const seconds = known((value) =>
  value === 0 ? "0 s" : value < 1 ? `${digits(value * 1000)} ms` : `${digits(value)} s`);

export const count = known((value) => {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (Math.abs(value) >= size) return `${digits(value / size)} ${unit}`;
  }
  return Number.isInteger(value) ? String(value) : digits(value);
});

export const whole = known((value) => (Number.isInteger(value) ? String(value) : ""));

export const perSecond = known((value) => `${count(value)}/s`);

export const bytes = known((value) => {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${digits(value / size)} ${unit}`;
  }
  return `${digits(value)} B`;
});

export const bytesPerSecond = known((value) => `${bytes(value)}/s`);

export const share = known((value) => `${(value * 100).toFixed(0)} %`);

export const tokens = known((value) => value.toFixed(2));

// Without noughts that say nothing: 2.00 s is 2 s on an axis.
export const tick = (text) => text.replace(/(\.\d*?)0+(?!\d)/, "$1").replace(/\.(?!\d)/, "");

export function span(value) {
  if (value < 60) return `${Math.max(0, value).toFixed(0)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const clock = (atS) => new Date(atS * 1000).toLocaleTimeString([], { hour12: false });
