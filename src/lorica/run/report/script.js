// Values under the pointer. The page is whole without this.
for (const area of document.querySelectorAll(".area[data-readings]")) {
  const lines = JSON.parse(area.dataset.readings);
  let shown = [];
  const make = (kind, colour) => {
    const made = document.createElement("div");
    made.className = kind + (colour === undefined ? "" : " k" + colour);
    area.append(made);
    shown.push(made);
    return made;
  };
  const clear = () => { for (const part of shown) part.remove(); shown = []; };
  area.addEventListener("pointerleave", clear);
  area.addEventListener("pointermove", (event) => {
    clear();
    const box = area.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    const near = (points) => points.reduce(
      (best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best);
    const found = lines.map((line) => ({ line, point: near(line.points) }));
    const first = found.reduce((a, b) => Math.abs(b.point[0] - at) < Math.abs(a.point[0] - at) ? b : a);
    make("pointer").style.left = 100 * first.point[0] + "%";
    const readout = make("readout");
    readout.style[first.point[0] < 0.5 ? "right" : "left"] = "6px";
    for (const { line, point } of found) {
      const dot = make("dot", line.colour);
      dot.style.left = 100 * point[0] + "%";
      dot.style.top = 100 * point[1] + "%";
      const row = document.createElement("div");
      const value = document.createElement("b");
      value.className = "k" + line.colour;
      value.textContent = point[3];
      row.append(value, ` ${line.name}, step ${point[2]}`);
      readout.append(row);
    }
  });
}
