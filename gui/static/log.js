// The log: the last part of it, progress bars folded into their newest line.

const LOG_MOST = 200_000;

class Log {
  constructor(node, follow) {
    this.node = node;
    this.follow = follow;
    this.closed = node.appendChild(document.createTextNode(""));
    this.open = node.appendChild(document.createTextNode(""));
    this.clear();
    follow.addEventListener("click", () => this.setFollow(!this.following));
    node.addEventListener("scroll", () => {
      const atEnd = node.scrollHeight - node.scrollTop - node.clientHeight < 24;
      if (atEnd !== this.following && !this.scrolling) this.setFollow(atEnd);
      this.scrolling = false;
    });
    new ResizeObserver(() => this.following && this.toEnd()).observe(node);
    this.setFollow(true);
  }

  clear() {
    this.closed.data = "";
    this.open.data = "";
    this.rest = "";
  }

  setFollow(following) {
    this.following = following;
    this.follow.setAttribute("aria-pressed", String(following));
    this.follow.textContent = following ? t`Following` : t`Paused`;
    if (following) this.toEnd();
  }

  toEnd() {
    this.scrolling = this.node.scrollTop + this.node.clientHeight + 1 < this.node.scrollHeight;
    this.node.scrollTop = this.node.scrollHeight;
  }

  add(text) {
    if (!text) return;
    // eslint-disable-next-line no-control-regex
    const lines = (this.rest + text.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "")).split("\n");
    this.rest = lines.pop();
    const whole = lines.map(folded);
    if (whole.length) this.closed.appendData(`${whole.join("\n")}\n`);
    if (this.closed.length > LOG_MOST) {
      const cut = this.closed.data.indexOf("\n", this.closed.length - LOG_MOST / 2) + 1;
      this.closed.deleteData(0, cut);
    }
    this.open.data = folded(this.rest);
    if (this.following) this.toEnd();
  }
}

// What a terminal would show of a line in which \r goes back to its start.
function folded(line) {
  if (!line.includes("\r")) return line;
  return line.split("\r").filter((part) => part.trim()).pop() || "";
}
