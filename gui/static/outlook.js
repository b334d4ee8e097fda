// What would be trained with the form as it stands, kept up with it.

class Outlook {
  constructor(form, server) {
    Object.assign(this, { form, server, node: byId("lw-outlook") });
    form.whenChanged.push(() => this.later());
  }

  // At once when the form has just come, later while it is typed in.
  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), this.asked ? 700 : 0);
    this.asked = true;
  }

  async ask() {
    if (this.asking) return this.later();
    this.asking = true;
    const entries = this.form.entries;
    try {
      const answer = await this.server.outlook({ entries });
      if (entries === this.form.entries) this.show(answer);
    } catch {
      this.timer = setTimeout(() => this.later(), 3000); // the live panel says that the server is away
    } finally {
      this.asking = false;
    }
  }

  show({ summary, errors, size, like }) {
    this.form.markFound(errors);
    this.form.remark("pretrained_model_name_or_path", summary.model || "");
    const parts = [];
    if (summary.images) {
      const beside = summary.regularisation ? t` and ${summary.regularisation} for regularisation` : "";
      parts.push(t`${counted(summary.images, "image")}${beside}, ${summary.repeats} seen in an epoch`);
    }
    if (summary.total_steps) parts.push(t`${counted(summary.total_steps, "step")} in ${counted(summary.epochs, "epoch")}`);
    if (size) {
      parts.push(t`${counted(size.modules, "module")}, ${millions(size.weights)} weights`);
      parts.push(t`a file of about ${bytes(size.file_bytes)}`);
    }
    if (like && summary.total_steps) {
      parts.push(t`about ${duration(like.seconds * summary.total_steps)} of steps${like.memory ? t`, ${bytes(like.memory)} of memory` : ""}, as in ${like.run}`);
    }
    const wrong = errors.length > 0 && make("button", { class: "lw-link", type: "button", title: t`Check tells what`, onclick: () => byId("lw-check").click() },
      errors.length === 1 ? t`one thing is still in the way` : t`${errors.length} things are still in the way`);
    this.node.replaceChildren(make("b", {}, t`Will be trained:`), " ", parts.join(" · ") || (wrong ? "" : t`nothing yet`), ...(wrong ? [parts.length ? " · " : "", wrong] : []));
  }
}

const millions = (n) => (n >= 1e5 ? t`${Number((n / 1e6).toPrecision(3))} million` : String(n));

function bytes(n) {
  const [unit, size] = n >= 2 ** 30 ? ["GB", 2 ** 30] : n >= 2 ** 20 ? ["MB", 2 ** 20] : ["kB", 1024];
  return `${Number((n / size).toPrecision(2))} ${unit}`;
}
