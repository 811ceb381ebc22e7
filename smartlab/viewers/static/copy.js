// A line of text with a button that copies it.

function render({ model, el }) {
  const button = document.createElement("button");
  const line = document.createElement("input");
  Object.assign(button, { type: "button", textContent: model.get("label"), className: "smartlab-save" });
  Object.assign(line, { readOnly: true, ariaLabel: model.get("label"), className: "smartlab-line" });
  el.classList.add("smartlab-viewer", "smartlab-copy");
  el.append(button, line);
  const show = () => {
    line.title = line.value = model.get("text") || model.get("why");
    button.disabled = !model.get("text");
    button.textContent = model.get("label");
  };
  button.addEventListener("click", async () => {
    line.select(); // where a page may not write to the clipboard (plain http), the line is ready for Ctrl+C
    try {
      await navigator.clipboard.writeText(line.value);
    } catch {
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(show, 1200);
  });
  // arrow keys belong to the explorer's controls, not to the notebook; Ctrl+S and its like stay the notebook's
  const sizes = new ResizeObserver(() => {
    const whole = el.closest(".smartlab-explorer");
    if (!whole) return;
    const own = (event) => whole.toggleAttribute("data-lm-suppress-shortcuts", !(event?.ctrlKey || event?.metaKey));
    for (const name of ["keydown", "keyup", "focusin"]) whole.addEventListener(name, own);
    own();
    sizes.disconnect();
  });
  sizes.observe(el);
  model.on("change:text", show);
  model.on("change:why", show);
  show();
}

export default { render };
