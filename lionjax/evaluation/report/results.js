// Shows the answers of the chosen benchmark and mark whose text has all words.
const cards = [...document.querySelectorAll(".answer")];
const fields = ["benchmark", "mark", "words"].map((id) => document.getElementById(id));
function filter() {
  const [benchmark, mark, words] = fields.map((field) => field.value);
  const parts = words.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const card of cards) {
    const fits = (!benchmark || card.dataset.benchmark === benchmark) && (!mark || card.dataset.mark === mark);
    card.hidden = !(fits && parts.every((part) => card.textContent.toLowerCase().includes(part)));
    shown += !card.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${cards.length}`;
}
for (const field of fields) field.addEventListener("input", filter);
filter();
