"use strict";
/* Every drawing can be saved as a file of its own; sections are listed at the top. The page works without this. */
(() => {
  const KEPT = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin",
    "stroke-linecap", "opacity", "font-family", "font-size", "font-weight"];
  const SPACE = "http://www.w3.org/2000/svg";

  /** The drawing as a file: colours and fonts written out, on white, whatever mode the reader is in. */
  function standalone(svg) {
    const root = document.documentElement;
    root.dataset.mode = "light";
    const copy = svg.cloneNode(true);
    copy.querySelectorAll("[data-only-here]").forEach(each => each.remove());
    const from = [...svg.querySelectorAll("*")].filter(each => !each.closest("[data-only-here]"));
    [...copy.querySelectorAll("*")].forEach((each, i) => {
      const style = getComputedStyle(from[i]);
      if (each.localName === "title") return;
      for (const name of KEPT) {
        if (name.startsWith("font") && each.localName !== "text") continue;
        each.setAttribute(name, style.getPropertyValue(name));
      }
      each.removeAttribute("class");
    });
    delete root.dataset.mode;
    const [, , width, height] = svg.getAttribute("viewBox").split(" ");
    const paper = document.createElementNS(SPACE, "rect");
    for (const [name, value] of [["width", width], ["height", height], ["fill", "#ffffff"]]) paper.setAttribute(name, value);
    copy.insertBefore(paper, copy.firstChild);
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    for (const name of [...copy.getAttributeNames()]) {
      if (name.startsWith("data-") || name === "class" || name === "tabindex" || name === "style") copy.removeAttribute(name);
    }
    return new XMLSerializer().serializeToString(copy);
  }

  function save(text, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  document.querySelectorAll("figure > svg").forEach((svg, i) => {
    const button = document.createElement("button");
    const title = svg.parentNode.querySelector("figcaption b").textContent;
    const section = svg.closest("section");
    const words = `${section && section.id ? section.id : "figure"} ${title}`.toLowerCase();
    button.type = "button";
    button.className = "save";
    button.textContent = "SVG";
    button.title = "Save this drawing as an SVG file";
    button.setAttribute("aria-label", `Save “${title}” as an SVG file`);
    button.addEventListener("click", () =>
      save(standalone(svg), `${words.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || i}.svg`));
    svg.parentNode.querySelector("figcaption").append(button);
  });

  const contents = document.getElementById("contents");
  for (const section of document.querySelectorAll("section[id]")) {
    const link = document.createElement("a");
    link.href = `#${section.id}`;
    link.textContent = section.querySelector("h2").textContent;
    contents.append(link);
  }
  contents.hidden = contents.childElementCount < 3;
})();
