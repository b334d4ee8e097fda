// The loss on a canvas: every step's, and averaged; a logarithmic axis; ticks where samples were made.

class Chart {
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    this.clear();
    redrawn(canvas, () => this.draw());
    canvas.addEventListener("pointermove", (event) => { this.pointer = event.offsetX; this.draw(); });
    canvas.addEventListener("pointerleave", () => { this.pointer = null; this.draw(); });
  }

  clear() {
    Object.assign(this, { steps: [], loss: [], average: [], rates: [], samples: [], resumed: null, pointer: null });
  }

  // points: [step, loss, average of the last steps, U-Net's rate, text encoder's rate]
  add(points) {
    for (const [step, loss, average, unet, text] of points) {
      this.steps.push(step);
      this.loss.push(loss);
      this.average.push(average ?? loss);
      this.rates.push([unet, text]);
    }
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.paint());
  }

  paint() {
    const { canvas, steps, loss, average } = this;
    const { pen, width, height, colour } = fresh(canvas);
    if (!width) return;
    if (!steps.length) {
      pen.fillStyle = colour("--lw-muted");
      pen.textAlign = "center";
      pen.fillText(t`The loss appears here from the first step on.`, width / 2, height / 2);
      this.readout.textContent = "";
      return;
    }
    const { box, x, y } = axes(pen, width, height, colour, steps[0], steps[steps.length - 1], loss);
    const first = steps[0];
    if (this.resumed > first) {
      const at = Math.round(x(this.resumed)) + 0.5;
      pen.strokeStyle = colour("--lw-muted");
      pen.setLineDash([3, 3]);
      pen.beginPath(); pen.moveTo(at, box.top); pen.lineTo(at, box.bottom); pen.stroke();
      pen.setLineDash([]);
    }
    pen.save();
    pen.beginPath(); pen.rect(box.left, box.top - 4, box.right - box.left, box.bottom - box.top + 4); pen.clip();
    // Where a pixel column holds many steps, it shows their range.
    pen.strokeStyle = colour("--lw-raw");
    trace(pen, steps, loss, x, y);
    pen.strokeStyle = colour("--lw-accent");
    pen.lineWidth = 2;
    trace(pen, steps, average, x, y);
    pen.restore();

    pen.fillStyle = colour("--lw-mark");
    for (const step of this.samples) {
      if (step < first) continue;
      const at = x(step);
      pen.beginPath(); pen.moveTo(at - 4, box.bottom + 7); pen.lineTo(at + 4, box.bottom + 7); pen.lineTo(at, box.bottom + 1); pen.fill();
    }
    this.point(pen, x, y, box, colour);
  }

  point(pen, x, y, box, colour) {
    const { steps, loss, average, rates } = this;
    let i = steps.length - 1;
    if (this.pointer !== null) {
      const wanted = steps[0] + ((this.pointer - box.left) / (box.right - box.left)) * (steps[i] - steps[0]);
      i = nearest(steps, wanted);
      pen.strokeStyle = colour("--lw-muted");
      pen.lineWidth = 1;
      pen.beginPath(); pen.moveTo(x(steps[i]), box.top); pen.lineTo(x(steps[i]), box.bottom); pen.stroke();
      pen.fillStyle = colour("--lw-accent");
      pen.beginPath(); pen.arc(x(steps[i]), y(average[i]), 3.5, 0, 7); pen.fill();
    }
    const rate = (value) => (value === null || value === undefined ? null : value > 0 && value < 0.001 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(3))));
    const [unet, text] = rates[i].map(rate);
    this.readout.textContent = [t`step ${steps[i]}`, t`loss ${average[i].toPrecision(3)} (this step ${loss[i].toPrecision(3)})`,
      unet && t`U-Net rate ${unet}`, text && t`text encoder rate ${text}`].filter(Boolean).join(" · ");
    this.canvas.setAttribute("aria-label", t`Loss over ${steps.length} steps. ${this.readout.textContent}`);
  }
}

// Draw whenever the canvas changes its size or the page its colours.
function redrawn(canvas, draw) {
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
}

// An empty canvas as sharp as the screen, with a pen, its size and the page's colours by name.
function fresh(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
  const pen = canvas.getContext("2d"), look = getComputedStyle(canvas);
  if (width) Object.assign(canvas, { width: width * scale, height: height * scale });
  pen.scale(scale, scale);
  pen.font = `11px ${look.fontFamily}`;
  return { pen, width, height, colour: (name) => look.getPropertyValue(name).trim() };
}

const LINE = 13; // a label's height

// Draw a logarithmic axis of losses and one of steps; returns the box between them, and where a step and a loss lie.
function axes(pen, width, height, colour, first, last, losses) {
  const box = { left: 46, right: width - 8, top: 8, bottom: height - 24 };
  const span = Math.max(1, last - first);
  const x = (step) => box.left + ((step - first) / span) * (box.right - box.left);
  const sorted = losses.filter((v) => v > 0).sort((a, b) => a - b);
  const low = Math.log10((sorted[Math.floor(sorted.length * 0.01)] || 1e-3) * 0.9);
  const high = Math.max(Math.log10((sorted[Math.ceil(sorted.length * 0.99) - 1] || 1) * 1.1), low + 0.3);
  const y = (v) => box.bottom - ((Math.log10(Math.max(v, 1e-9)) - low) / (high - low)) * (box.bottom - box.top);

  pen.strokeStyle = colour("--lw-grid");
  pen.fillStyle = colour("--lw-muted");
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  let above = -LINE;
  for (const value of logTicks(low, high, Math.max(3, Math.floor((box.bottom - box.top) / 24))).reverse()) {
    const at = Math.round(y(value)) + 0.5;
    if (at - above < LINE) continue; // 0.098 under 0.1: a decade's end is denser than the next one's beginning
    above = at;
    pen.beginPath(); pen.moveTo(box.left, at); pen.lineTo(box.right, at); pen.stroke();
    pen.fillText(String(Number(value.toPrecision(3))), box.left - 6, at);
  }
  pen.textBaseline = "alphabetic";
  pen.textAlign = "center";
  for (const value of stepTicks(first, first + span, Math.max(2, Math.floor(width / 90)))) {
    const at = Math.min(Math.max(x(value), box.left + 8), box.right - 12);
    pen.fillText(String(value), at, height - 4);
  }
  return { box, x, y };
}

function trace(pen, steps, values, x, y) {
  pen.beginPath();
  for (let i = 0; i < steps.length;) {
    const column = Math.round(x(steps[i]));
    let low = values[i], high = values[i], last = values[i];
    const begin = i;
    for (; i < steps.length && Math.round(x(steps[i])) === column; i++) {
      last = values[i];
      if (last < low) low = last;
      if (last > high) high = last;
    }
    if (i - begin > 1) { pen.lineTo(column, y(high)); pen.lineTo(column, y(low)); }
    pen.lineTo(column, y(last));
  }
  if (steps.length === 1) pen.arc(x(steps[0]), y(values[0]), 1.5, 0, 7);
  pen.stroke();
}

// The densest of these divisions of a decade that gives no more ticks than have room.
const DIVISIONS = [
  ...[0.1, 0.2, 0.5].map((gap) => Array.from({ length: Math.round(9 / gap) }, (_, i) => 1 + i * gap)),
  [1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1],
];

function logTicks(low, high, most) {
  let found = [];
  for (const parts of DIVISIONS) {
    found = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
      for (const part of parts) {
        const value = Math.log10(part) + power;
        if (value >= low && value <= high) found.push(part * 10 ** power);
      }
    }
    if (found.length <= most) break;
  }
  return found;
}

function stepTicks(from, to, most) {
  const rough = (to - from) / most, power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const gap = [1, 2, 5, 10].map((m) => m * power).find((g) => g >= rough) || power * 10;
  const found = [];
  for (let value = Math.ceil(from / gap) * gap; value <= to; value += gap) found.push(value);
  return found;
}

function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}
