// What lies under the pointer: the nearest point of each line and dot, read off the picture.
(() => {
  const short = (v) => Math.abs(v) >= 1e4 ? Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 }).format(v) : String(+v.toPrecision(5));
  for (const chart of document.querySelectorAll("svg.chart")) {
    const plane = chart.querySelector("svg"), figure = chart.closest("figure");
    if (!plane || !figure) continue;
    const [left, top, wide, tall] = plane.getAttribute("viewBox").split(" ").map(Number);
    const [x0, x1, y0, y1] = chart.dataset.edges.split(" ").map(Number), log = "log" in chart.dataset;
    const xOf = (p) => { const f = (p - left) / wide; return log ? x0 * Math.pow(x1 / x0, f) : x0 + f * (x1 - x0); };
    const yOf = (p) => y1 - (p - top) / tall * (y1 - y0);
    const lines = [...chart.querySelectorAll("polyline.line")].map((line) => [line.dataset.name, [...line.points].map((p) => [p.x, p.y])]);
    const out = document.createElement("output"), cursor = document.createElementNS(chart.namespaceURI, "line");
    out.className = "readout"; out.hidden = true; cursor.setAttribute("class", "cursor"); cursor.style.display = "none";
    figure.append(out); chart.append(cursor);
    const hide = () => { out.hidden = true; cursor.style.display = "none"; };
    const show = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse()).x;
      if (at < left || at > left + wide) return hide();
      const near = (points) => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      const said = lines.filter(([, points]) => points.length).map(([name, points]) => `${name} ${short(yOf(near(points)[1]))}`);
      out.textContent = [short(xOf(at)), ...said].join("\n"); out.hidden = false;
      for (const [key, value] of [["x1", at], ["x2", at], ["y1", top], ["y2", top + tall]]) cursor.setAttribute(key, value);
      cursor.style.display = "";
    };
    chart.addEventListener("pointermove", show);
    chart.addEventListener("pointerdown", show);
    chart.addEventListener("pointerleave", hide);
  }
})();
