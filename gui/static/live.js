// The live panel: asks for what is new, and shows state, progress, loss, samples and log.

const PAGE = Math.random().toString(36).slice(2); // tells this page from another one
const QUIET_S = 90, KILL_AFTER_S = 60;

class Live {
  constructor(server, form) {
    this.server = server;
    this.form = form;
    this.chart = new Chart(byId("lw-loss"), byId("lw-readout"));
    this.samples = new Samples();
    this.pinned = "";
    this.failures = 0;
    this.whenBusy = () => {};
    this.whenBack = () => {};
    this.resuming = () => {};
    this.controls();
    this.forget("");
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.soon(0); });
    this.poll();
  }

  // All that is not for those who only look on (view.js).
  controls() {
    this.log = new Log(byId("lw-log"), byId("lw-follow"));
    this.pinned = new URLSearchParams(location.hash.slice(1)).get("run") || "";
    for (const word of ["sample", "save", "stop"]) byId(`lw-${word}-now`).addEventListener("click", () => this.told(this.request(word)));
    byId("lw-kill").addEventListener("click", () => this.told(this.kill()));
    for (const link of byId("lw-way").querySelectorAll("[data-tab]")) link.addEventListener("click", () => this.form.open(link.dataset.tab));
    byId("lw-resume").addEventListener("click", () => this.resuming(this.run));
    byId("lw-jump").addEventListener("click", () => byId("live").scrollIntoView({ behavior: "smooth" }));
    byId("lw-latest").addEventListener("click", () => this.watch(""));
    byId("lw-log-file").addEventListener("click", (event) => { event.preventDefault(); this.told(this.download("log.txt")); });
  }

  // Follow one run, or with "" whichever is the newest.
  watch(run) {
    this.pinned = run;
    history.replaceState(null, "", run ? `#run=${encodeURIComponent(run)}` : location.pathname + location.search);
    this.soon(0);
  }

  forget(run) {
    Object.assign(this, { run, events: 0, logAt: 0, state: null, started: null, phase: null, step: null, saved: [], proofs: new Map(), warnings: [], ended: null, answer: null });
    this.chart.clear();
    this.samples.clear();
    this.log?.clear();
  }

  soon(delay_ms) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), delay_ms);
  }

  // One question at a time; the next only after the answer to the last.
  async poll() {
    if (this.asking || !byId("live").isConnected) { this.again = this.asking; return; }
    this.asking = true;
    let wait;
    try {
      const answer = await this.server.poll({ run: this.run, follow: this.pinned, events: this.events, log: this.logAt, page: PAGE });
      if (byId("lw-others")) byId("lw-others").hidden = !answer.others; // who only looks on has no form
      if (this.failures) this.whenBack();
      this.failures = 0;
      wait = this.take(answer);
    } catch (error) {
      this.failures += 1;
      wait = Math.min(5000, 1000 * 2 ** (this.failures - 1));
      this.unreachable(error);
    }
    this.asking = false;
    if (this.again) wait = 0;
    this.again = false;
    this.soon(wait);
  }

  // Take an answer in; returns how long to wait before the next question.
  take(answer) {
    this.offset_s = answer.now - Date.now() / 1000;
    if (answer.run !== this.run || answer.from !== this.events) this.forget(answer.run);
    if (answer.run === null) { this.idle(); return document.hidden ? 5000 : 2000; }
    this.answer = answer;
    const before = this.state;
    this.state = answer.state;
    this.events = answer.events;
    if (this.log && answer.log_from !== this.logAt && this.logAt) this.log.clear();
    this.logAt = answer.log;
    for (const key of ["started", "phase", "step", "ended"]) if (answer[key]) this[key] = answer[key];
    this.saved.push(...answer.saved);
    for (const proof of answer.verified) this.proofs.set(proof.path, proof);
    this.warnings.push(...answer.warnings);
    this.chart.resumed = this.started?.first_step > 1 ? this.started.first_step : null;
    this.chart.add(answer.points);
    if (this.samples.add(answer.samples)) this.chart.samples = this.samples.steps();
    this.show();
    if (before !== this.state) this.samples.show(); // what is still to be drawn is so no longer
    if (answer.points.length || answer.samples.length || !this.drawn) this.chart.draw();
    this.drawn = true;
    this.log?.add(answer.text);
    if (answer.more || answer.log < answer.log_size && answer.text) return 0;
    if (document.hidden) return 5000;
    return { starting: 400, stopping: 400, running: 1000 }[this.state] || 2000;
  }

  idle() {
    this.state = null;
    byId("live").classList.add("lw-idle");
    byId("lw-way")?.removeAttribute("hidden"); // not before it is known that there is no run
    this.pill("idle", t`no run yet`);
    this.say(t`Nothing has been trained yet. The way there:`);
    this.progress(0, 0);
    this.buttons();
    byId("lw-run").textContent = "";
    this.chart.draw();
    document.title = "Lorawright";
  }

  unreachable(error) {
    if (this.failures < 2) return; // one lost answer is no news
    this.pill("unreachable", error.status === 401 ? t`logged out` : t`server unreachable`);
    this.say(t`${error.message} Training is not affected. ${error.status === 401 ? "" : t`Trying again …`}`);
    document.title = "⚠ Lorawright";
  }

  show() {
    const { answer, state, step, phase } = this;
    byId("live").classList.remove("lw-idle");
    const now = answer.now, total = step?.total || this.started?.total_steps || 0;
    const working = phase && phase.name !== "training" && (!step || phase.time >= step.time) ? phase : null;
    const doing = working ? said(working.name) + (working.total ? ` ${working.done}/${working.total}` : "") : phase && !step ? t`first step` : "";
    byId("lw-run").textContent = this.run;
    byId("lw-run").title = this.run;

    const quiet = now - answer.last_event;
    const alive = ["starting", "running", "stopping"].includes(state);
    let look = state, short = state, sentence = "", figures = [];
    if (state === "starting") {
      short = t`starting · ${doing || t`launching the trainer`}`;
      sentence = this.started ? this.outline() : "";
    } else if (state === "running") {
      short = t`running ${step.step}/${total}`;
      figures.push(t`epoch ${step.epoch}/${step.epochs}`);
      if (step.steps_per_s > 0) figures.push(step.steps_per_s >= 1 ? t`${step.steps_per_s.toFixed(1)} it/s` : t`${(1 / step.steps_per_s).toFixed(1)} s/it`);
      if ((step.seconds_left ?? null) !== null) figures.push(t`ETA ${duration(Math.max(0, step.seconds_left - (now - step.time)))}`);
      if (step.memory_bytes) figures.push(t`${(step.memory_bytes / 2 ** 30).toFixed(1)} GB`);
      sentence = doing ? t`Now: ${doing}` : this.outline();
    } else if (state === "stopping") {
      const drawing = working?.name === "drawing samples";
      short = step && !drawing ? t`stopping · saving at step ${step.step}` : t`stopping`;
      sentence = drawing ? t`The picture is left unfinished; it stops after one more step.`
        : doing ? t`Now: ${doing}. Then it stops.` : t`The step it is in is finished and saved.`;
    } else if (state === "stopped" || state === "done") {
      const end = this.ended;
      const at = end?.step ?? step?.step ?? 0;
      short = state === "done" ? t`done · ${end?.step ?? ""} steps` : end?.by === "SIGTERM" ? t`stopped by the system · at step ${at}` : t`stopped · at step ${at}`;
      sentence = this.result(end);
    } else if (state === "crashed") {
      short = step ? t`crashed · at step ${step.step}` : t`crashed`;
    }
    if (alive && quiet > QUIET_S) {
      look = "quiet";
      sentence = t`No sign of life for ${duration(quiet)}${doing ? t`, in: ${doing}` : step ? t`, after step ${step.step}` : ""}. Large models can take that long; the log may tell.`;
    }
    this.pill(look, short, figures);
    this.announce(look === "quiet" ? t`no sign of life` : said(state));
    this.say(sentence);
    this.progress(working && state === "starting" ? working.done : step?.step || 0, working && state === "starting" ? working.total : total, alive);
    this.crash(state === "crashed" ? answer.cause : null);
    this.files();
    this.buttons();
    const percent = total && step ? `${Math.floor((100 * step.step) / total)} % ` : "";
    document.title = `${{ running: `▶ ${percent}`, starting: "… ", stopping: "■ ", done: "✓ ", stopped: "■ ", crashed: "✗ " }[state] || ""}Lorawright`;
    this.warn();
  }

  // Where the file is, and how long it took.
  result(end) {
    if (!end?.path || end.path === "None") return end?.step ? t`Nothing was trained behind step ${end.step}, where it went on from.` : t`Nothing had been trained yet.`;
    return `${end.path}${end.seconds ? ` · ${duration(end.seconds)}` : ""}`;
  }

  outline() {
    const s = this.started;
    return s ? t`${counted(s.images, "image")} · ${s.family} · ${s.device} · ${s.precision} · seed ${s.seed}` + (s.first_step > 1 ? t` · resumed at step ${s.first_step}` : "") : "";
  }

  // What is between two figures is where a narrow panel may break the line.
  pill(look, text, figures = []) {
    const pill = byId("lw-pill"), beside = byId("lw-figures");
    const said = figures.map((figure) => figure.replaceAll(" ", "\u00a0")).join(" · ");
    if (beside.textContent !== said) beside.textContent = said;
    pill.dataset.state = look;
    if (pill.textContent === text) return;
    pill.textContent = text;
    this.headline(look, text.split(" · ")[0]);
  }

  // In the bar, where the panel is out of sight.
  headline(look, text) {
    byId("lw-jump").dataset.state = look;
    byId("lw-jump").textContent = text;
  }

  // Said aloud by screen readers, so only when the state changes, not at every step.
  announce(text) {
    if (byId("lw-announce").textContent !== text) byId("lw-announce").textContent = text;
  }

  say(text) {
    const node = byId("lw-sentence");
    if (node.textContent !== text) node.textContent = text;
  }

  progress(done, total, alive = false) {
    const bar = byId("lw-progress");
    bar.setAttribute("aria-valuemax", String(total || 1));
    bar.setAttribute("aria-valuenow", String(done));
    bar.classList.toggle("lw-waiting", alive && !total);
    bar.firstElementChild.style.width = `${total ? (100 * done) / total : 0}%`;
  }

  buttons() {
    const { state, answer } = this;
    const busy = state === "starting" || state === "running";
    byId("lw-sample-now").disabled = byId("lw-save-now").disabled = state !== "running";
    byId("lw-stop-now").disabled = !busy;
    this.whenBusy(busy || state === "stopping");
    byId("lw-latest").hidden = !this.pinned;
    byId("lw-resume").hidden = !answer?.resumable;
    byId("lw-kill").hidden = !(state === "stopping" && answer.stop_asked && answer.now - answer.stop_asked > KILL_AFTER_S);
    const waiting = answer?.waiting || [];
    byId("lw-next").textContent = waiting.length ? t`When this run ends, also by Stop, the queue goes on: ${waiting[0].slice(16)} starts at once${waiting.length > 1 ? t`, ${waiting.length - 1} more after it` : ""}.` : "";
    byId("lw-actions").hidden = !(busy || state === "stopping");
  }

  warn() {
    const node = byId("lw-warnings");
    if (node.childElementCount === this.warnings.length) return;
    node.replaceChildren(...this.warnings.map((w) => make("li", {}, [w.message, w.hint].filter(Boolean).join(" "))));
    byId("lw-warnings-box").hidden = !this.warnings.length;
    byId("lw-warnings-count").textContent = counted(this.warnings.length, "warning");
  }

  crash(cause) {
    const node = byId("lw-crash");
    node.hidden = !cause;
    const key = JSON.stringify(cause);
    if (!cause || node.dataset.cause === key) return;
    node.dataset.cause = key;
    node.replaceChildren(
      make("strong", {}, cause.title), make("p", {}, cause.message), cause.hint ? make("p", {}, cause.hint) : "",
      make("p", { class: "lw-row" },
        ...cause.keys.filter((k) => this.form.known(k)).map((k) =>
          make("button", { class: "lw-link lw-control", type: "button", onclick: () => this.form.focus(k) }, this.form.label(k))),
        make("button", { class: "lw-link", type: "button", onclick: () => this.told(this.download("log.txt")) }, t`Whole log`)));
  }

  files() {
    const node = byId("lw-saved");
    const ready = this.saved.filter((s) => s.what !== "state");
    const count = `${this.run}:${ready.length}:${this.proofs.size}`;
    if (node.dataset.count === count) return;
    node.dataset.count = count;
    const latest = ready.slice(-6).reverse();
    const name = (path) => path.split(/[\\/]/).pop();
    node.replaceChildren(...latest.map((s) =>
      make("button", { class: `lw-button ${s.what === "final" ? "lw-primary" : ""}`, type: "button", title: s.path,
        onclick: () => this.told(this.download(name(s.path))) }, `↓ ${name(s.path)}${this.mark(s.path)}`)));
    if (ready.length > latest.length) node.append(make("span", { class: "lw-facts" }, t`and ${ready.length - latest.length} earlier`));
    const proof = latest.length ? this.proofs.get(latest[0].path) : null;
    if (proof) node.append(this.proof(proof));
  }

  mark(path) {
    const proof = this.proofs.get(path);
    return proof ? (proof.problems.length ? " ✗" : " ✓") : "";
  }

  // What reading the newest file back has shown: a sentence, and behind it all that was proved.
  proof(proof) {
    const bad = proof.problems.length > 0;
    const whole = proof.loads_in.length ? t`✓ loads in ${proof.loads_in.join(", ")}` : t`✓ whole, but no other program is known to load it`;
    const others = Object.entries(proof.passed_over).map(([program, why]) => `${program} ${why}.`);
    return make("details", { class: `lw-proof ${bad ? "lw-bad" : ""}` },
      make("summary", {}, bad ? `✗ ${proof.problems.join(" ")}` : whole),
      make("ul", {}, ...[...proof.checks.map((check) => `✓ ${check}`), ...proof.warnings, ...others].map((line) => make("li", {}, line))));
  }

  // An order that fails is told, not lost.
  told(order) {
    return order.catch((error) => this.say(t`This did not arrive. ${error.message}`));
  }

  async request(word) {
    byId(`lw-${word}-now`).disabled = true;
    await this.server.control({ run: this.run, word });
    this.soon(word === "stop" ? 0 : 1000);
  }

  async kill() {
    const text = make("p", {}, t`The trainer ends at once. What it learned since the last saved file is lost.`);
    if ((await ask(t`Kill the trainer?`, text, [["", t`Leave it`], ["kill", t`Kill`, "lw-danger"]])) !== "kill") return;
    await this.server.control({ run: this.run, word: "kill" });
    this.soon(0);
  }

  async download(name, run = this.run) {
    const answer = await this.server.download({ run, name });
    if (!answer.path) { this.say(t`${name} is no longer there.`); return; }
    const link = make("a", { href: fileAddress(answer.path), download: name });
    document.body.append(link);
    link.click();
    link.remove();
  }
}

function duration(seconds) {
  if (seconds < 60) return t`${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return t`${Math.round(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  return t`${hours} h ${Math.round((seconds - hours * 3600) / 60)} min`;
}
