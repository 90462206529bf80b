// What all pages share: their data, and a short way to find and to make elements.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
const element = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
