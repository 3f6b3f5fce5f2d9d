// Dialogs: details, and actions, each of which asks before and says what came of it.

import { ApiError } from "./api.js";
import { h } from "./dom.js";

/** Shows a dialog with this content; returns the element. It is removed when closed, and the focus goes back. */
export function show(title, ...content) {
  const close = h("button", { type: "button", class: "quiet", click: () => dialog.close(), text: "Close" });
  const heading = h("h2", { id: `dialog-${(show.number += 1)}`, tabindex: "-1", text: title });
  const dialog = h("dialog", { "aria-labelledby": heading.id }, h("div", { class: "dialog-head" }, heading, close), ...content);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && event.detail > 0) dialog.close(); // on the backdrop
  });
  document.body.append(dialog);
  dialog.showModal();
  heading.focus();
  return dialog;
}
show.number = 0;

/** Asks, acts, and shows the result.
 *
 * `fields` are controls with their labels, `run` gets their values by name and returns a sentence, or several. */
export function confirm({ title, text, fields = [], button, dangerous = false, run, done = () => {}, onFailure = () => {} }) {
  const result = h("div", { class: "result", role: "status" });
  const go = h("button", { type: "submit", class: dangerous ? "dangerous" : "primary", text: button });
  const cancel = h("button", { type: "button", click: () => dialog.close(), text: "Cancel" });
  const form = h("form", { submit: act }, h("p", { text }), ...fields, h("div", { class: "buttons" }, go, cancel), result);
  const dialog = show(title, form);

  async function act(event) {
    event.preventDefault();
    const values = Object.fromEntries(new FormData(form));
    go.disabled = true;
    result.className = "result";
    result.replaceChildren("Working …");
    try {
      const lines = [await run(values)].flat();
      result.classList.add("good");
      result.replaceChildren(...lines.map((line) => h("p", { text: line })));
      for (const control of form.elements) control.disabled = control !== cancel;
      cancel.textContent = "Close";
      cancel.focus();
      done();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      onFailure(error);
      result.classList.add("bad");
      const lines = error.problems?.length > 1 ? error.problems : [error.message];
      result.replaceChildren(...lines.map((line) => h("p", { text: line })));
      go.disabled = false;
    }
  }
}
