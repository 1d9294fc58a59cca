// What the page asks of the cluster: scale, another role, drain. Each is confirmed in a dialog, begun
// by the control API, and then followed in the list of changes. A refusal is shown where it was asked.

import * as api from "./api.js";
import * as format from "./format.js";

const $ = (id) => document.getElementById(id);
const OTHER = { prefill: "decode", decode: "prefill" };

export class Controls {
  // `lost(error)`: the token is refused. `begun(change)`: something was granted.
  constructor(memory, { lost, begun }) {
    this.memory = memory;
    this.lost = lost;
    this.begun = begun;
    this.pending = null;
    this.shown = "";
    $("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    $("ask-replicas").addEventListener("input", () => this.#name());
    $("worker-drain").addEventListener("click", () => this.#act("drain"));
    $("worker-role").addEventListener("click", () => this.#act("role"));
    for (const button of document.querySelectorAll("dialog [data-close]")) {
      button.addEventListener("click", () => button.closest("dialog").close());
    }
  }

  scale(pool, replicas) {
    this.#open({
      path: `v1/pools/${pool.name}/scale`,
      title: `Scale ${pool.name}`,
      text: `It has ${pool.ready} ready of ${pool.desired} wanted. Those too many finish what they have.`,
      go: () => `Scale from ${pool.desired} to ${$("ask-replicas").value || "…"}`,
      body: () => ({ replicas: Number($("ask-replicas").value) }),
      replicas,
    });
  }

  showWorker(id) {
    this.shown = id;
    if (!this.#refreshWorker()) return;
    $("worker").showModal();
  }

  // With what is known now; whether it is still there.
  refresh() {
    if ($("worker").open && !this.#refreshWorker()) $("worker").close();
  }

  #act(kind) {
    const worker = this.memory.workers.get(this.shown);
    $("worker").close();
    if (!worker) return;
    const at = `v1/workers/${worker.name}/${kind}`;
    if (kind === "drain") {
      this.#open({
        path: at,
        title: `Drain ${worker.name}`,
        text: "It ends once it has finished what it has. Its pool starts another in its place.",
        go: () => `Drain ${worker.name}`,
        body: () => ({}),
      });
      return;
    }
    const role = OTHER[worker.role];
    this.#open({
      path: at,
      title: `Have ${worker.name} ${role}`,
      text: `It serves as ${worker.role} now. Where its engine can do both, this is a change of routing; else a new start.`,
      go: () => `Change to ${role}`,
      body: () => ({ role, may_restart: $("ask-restart").checked }),
      mayRestart: true,
    });
  }

  #open(pending) {
    this.pending = pending;
    $("ask-title").textContent = pending.title;
    $("ask-text").textContent = pending.text;
    $("ask-problem").textContent = "";
    $("ask-why").value = "";
    $("ask-grace").value = "60";
    $("ask-restart").checked = false;
    const hasReplicas = pending.replicas !== undefined;
    $("ask-replicas-row").hidden = !hasReplicas;
    $("ask-replicas").disabled = !hasReplicas;
    $("ask-replicas").value = hasReplicas ? pending.replicas : "";
    $("ask-restart-row").hidden = !pending.mayRestart;
    this.#name();
    $("ask-go").disabled = false;
    $("ask").showModal();
    $("ask-go").focus();
  }

  #name() {
    if (this.pending) $("ask-go").textContent = this.pending.go();
  }

  async #send() {
    const { pending } = this;
    $("ask-go").disabled = true;
    $("ask-problem").textContent = "";
    const body = { ...pending.body(), grace_s: Number($("ask-grace").value),
      why: $("ask-why").value.trim() };
    try {
      const change = await api.ask(pending.path, body);
      $("ask").close();
      this.begun(change);
    } catch (error) {
      if (error instanceof api.WrongToken) {
        $("ask").close();
        this.lost(error);
        return;
      }
      $("ask-problem").textContent = error.message;
    } finally {
      $("ask-go").disabled = false;
    }
  }

  #refreshWorker() {
    const worker = this.memory.workers.get(this.shown);
    if (!worker) return false;
    $("worker-title").textContent = worker.name;
    $("worker-message").textContent = worker.message;
    const upForS = this.memory.now.at_s - worker.started_at_s;
    const facts = [
      ["State", worker.state],
      ["Role", worker.role],
      ["Generation", worker.generation],
      ["Epoch of its role", worker.epoch],
      ["Node", worker.node || "not placed yet"],
      ["Up for", format.span(upForS)],
      ["Running, waiting", `${worker.running}, ${worker.waiting}`],
      ["KV in use", format.share(worker.kv_usage)],
      ["Prompt tokens", format.perSecond(worker.prompt_tokens_per_s)],
      ["Generated tokens", format.perSecond(worker.generation_tokens_per_s)],
      ["Acceptance length", format.tokens(worker.acceptance_length)],
      ["KV pulled", `${format.bytesPerSecond(worker.bytes_per_s)}, ${format.count(worker.transfers_per_s)} transfers/s`],
    ];
    $("worker-facts").replaceChildren(...facts.flatMap(([name, value]) => {
      const [term, said] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      said.textContent = value;
      return [term, said];
    }));
    const other = OTHER[worker.role];
    $("worker-role").hidden = !other;
    $("worker-role").textContent = `Have it ${other}…`;
    return true;
  }
}
