// Shows openapi.json to people.
"use strict";

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text !== null) element.textContent = text;
  element.append(...children);
  return element;
}

function parameterTable(parameters) {
  const rows = parameters.map((p) => make("tr", null, make("td", null, make("code", p.name)), make("td", p.in + (p.required
    ? ", needed" : "")), make("td", p.description + ("default" in p.schema ? " [" + p.schema.default + "]" : ""))));
  return make("table", null, make("tbody", null, ...rows));
}

fetch("/openapi.json").then((response) => response.json()).then((api) => {
  document.getElementById("title").textContent = api.info.title;
  document.getElementById("description").textContent = api.info.description;
  const parts = [];
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, of] of Object.entries(methods)) {
      parts.push(make("h2", method.toUpperCase() + " " + path), make("p", of.summary));
      if (of.parameters && of.parameters.length) {
        const all = of.parameters.map((p) => (p.$ref ? api.components.parameters[p.$ref.split("/").pop()] : p));
        parts.push(parameterTable(all));
      }
      if (of["x-example"]) parts.push(make("pre", of["x-example"].replaceAll("ADDRESS", location.origin)));
    }
  }
  document.getElementById("paths").replaceChildren(...parts);
});
