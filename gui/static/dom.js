// Making elements, without ever parsing text as HTML.

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && !name.includes("-")) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const byId = (id) => document.getElementById(id);

// Tabs are built when they are first opened, so a part of the page may come later.
function whenThere(find, patience_ms = 3000) {
  const until = performance.now() + patience_ms;
  return new Promise((resolve, reject) => {
    (function look() {
      const found = find();
      if (found) resolve(found);
      else if (performance.now() > until) reject(new Error(t`a part of the page did not appear`));
      else requestAnimationFrame(look);
    })();
  });
}

// A modal question: resolves to the pressed button's value, or "" when it was left. Enter in a field means the first
// button with a value, never the one that leaves.
function ask(title, content, buttons) {
  return new Promise((resolve) => {
    const form = make("form", { method: "dialog", class: "lw-dialog-form" },
      make("h2", {}, title), content,
      make("div", { class: "lw-dialog-buttons" },
        ...buttons.map(([value, label, look]) => make("button", { value, class: `lw-button ${look || ""}`,
          ...(value ? {} : { type: "button", onclick: () => dialog.close("") }) }, label))));
    const dialog = make("dialog", { class: "lw-dialog", "aria-label": title }, form);
    dialog.addEventListener("close", () => { dialog.remove(); resolve(dialog.returnValue); });
    document.body.append(dialog);
    dialog.showModal();
  });
}

const ARROWS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

// A picture as large as the window allows. `told`: its address, what it shows, and the words under it;
// `next(right, down)`: those of the one that an arrow key leads to, or null. `beside`: what stands under the words.
function enlarged(label, told, next, ...beside) {
  const image = make("img", {}), text = make("figcaption", {});
  const dialog = make("dialog", { class: "lw-dialog lw-large", "aria-label": label }, make("figure", {}, image, text), ...beside,
    make("button", { class: "lw-close", type: "button", "aria-label": t`Close`, onclick: () => dialog.close() }, "×"));
  const show = (found) => { if (found) [image.src, image.alt, text.textContent] = found; };
  dialog.addEventListener("keydown", (event) => {
    if (!ARROWS[event.key]) return;
    event.preventDefault();
    show(next(...ARROWS[event.key]));
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  show(told);
  dialog.showModal();
}

// The address of a file that the server lets us have, also behind a proxy or a tunnel.
function fileAddress(path) {
  const parts = path.replaceAll("\\", "/").split("/").map(encodeURIComponent).join("/");
  return `${window.gradio_config?.root || ""}/gradio_api/file=${parts}`;
}

// Gradio answers a failed call with undefined, whatever the reason; find the reason and throw it.
function reliable(server) {
  return new Proxy({}, {
    get: (_, name) => async (order) => {
      const answer = await server[name](order);
      if (answer !== undefined) return answer;
      let status = 0;
      try {
        status = (await fetch(`${window.gradio_config?.root || ""}/gradio_api/queue/status`)).status;
      } catch { /* the server is gone, which is what status 0 says */ }
      const reasons = { 0: t`The server does not answer.`, 401: t`Your login has ended; reload the page.`, 200: t`The server failed at this; its terminal says why.` };
      throw Object.assign(new Error(reasons[status] || t`The server refuses (status ${status}).`), { status });
    },
  });
}
