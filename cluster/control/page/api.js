// The control API: the token, what is asked, and what an answer that is no success says.
// The token is in this tab's sessionStorage and in the Authorization header, nowhere else.

const KEY = "pdcluster-control-token";
const PATIENCE_MS = 10000;

export class Refused extends Error {}
export class WrongToken extends Error {}

export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  keep: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export function live(since, eventsAfter) {
  return call("GET", `v1/live?since=${since}&events_after=${eventsAfter}`);
}

export function past(spanS) {
  return call("GET", `v1/past?span_s=${spanS}`);
}

// Begins a change and returns it. Throws Refused with the controller's own words.
export function ask(path, body) {
  return call("POST", path, body);
}

async function call(method, path, body) {
  const headers = { authorization: `Bearer ${token.get()}` };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    headers["x-pdcluster-asked-by"] = "page";
    headers["idempotency-key"] = key();
  }
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
  } catch (error) {
    throw new Error("The control API does not answer", { cause: error });
  }
  if (answer.status === 401) throw new WrongToken("The control API refuses this token.");
  const said = await answer.json().catch(() => null);
  if (answer.ok && said !== null) return said;
  throw new Refused(said?.error?.message ?? `The control API answered ${answer.status}.`);
}

// crypto.randomUUID is there on https and localhost only.
function key() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
