// Draws formulas with KaTeX: those of pages, which pymdownx.arithmatex marks, and those of notebooks.
const options = { throwOnError: false };
const marked = [
  { left: "\\(", right: "\\)", display: false },
  { left: "\\[", right: "\\]", display: true },
];
const dollars = [
  { left: "$$", right: "$$", display: true },
  { left: "$", right: "$", display: false },
];

document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    renderMathInElement(element, { ...options, delimiters: marked });
  }
  for (const element of document.querySelectorAll(".jp-RenderedMarkdown")) {
    renderMathInElement(element, { ...options, delimiters: [...dollars, ...marked] });
  }
});
