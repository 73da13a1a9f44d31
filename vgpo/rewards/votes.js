"use strict";
const token = location.hash.slice(1);  // the part of an address that no browser sends
const find = id => document.getElementById(id);
let answers = {}, busy = false;  // {key: what to do}

async function ask(path, body) {
  const headers = {"Authorization": `Bearer ${token}`, "Content-Type": "application/json"};
  const answer = await fetch(path, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body)});
  if (answer.status === 409) return ask("/ballot");  // somebody else has voted
  const value = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(value.error), {refused: true});
  return value;
}

async function go(path, body) {
  if (busy) return;
  busy = true;
  try {
    const state = await ask(path, body);
    show(state);
    if (!state.ballot) setTimeout(go, 1000, "/ballot");
  } catch (error) {
    find("status").textContent = error.refused ? error.message : "The server cannot be reached; trying again …";
    if (!error.refused) setTimeout(go, 2000, "/ballot");
  } finally { busy = false; }
}

function button(parent, label, keys, act) {
  const made = document.createElement("button"), text = document.createElement("span"), key = document.createElement("kbd");
  text.textContent = `${label} `;
  key.textContent = keys[0] ?? "";
  made.append(text, ...(keys.length ? [key] : []));
  made.addEventListener("click", act);
  for (const name of keys) answers[name] = act;
  parent.append(made);
  return made;
}

function picture(data, alt) {
  const image = document.createElement("img");
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 200));
  Object.assign(image, {src: data, alt});
  return image;
}

function show(state) {
  const {ballot, done, total, kept} = state, images = find("images"), others = find("others");
  answers = {};
  images.replaceChildren();
  others.replaceChildren();
  find("status").textContent = ballot ? `${done} of ${total} votes of this batch are in`
    : `Thank you. Nothing is asked now; this page waits for the next batch (${kept} votes are kept).`;
  document.title = ballot ? `${done}/${total} votes` : "Votes";
  Object.assign(find("progress"), {value: ballot ? done : 1, max: ballot ? total : 1});
  find("prompt").textContent = ballot ? ballot.prompt : "";
  find("question").textContent = !ballot ? "" : ballot.images.length > 1 ? "Which image is best?" : "Is this image good?";
  if (ballot) {
    const vote = choice => () => go("/vote", {key: ballot.key, choice}), count = ballot.images.length;
    images.className = count > 1 ? "" : "one";
    if (count > 1) {
      ballot.images.forEach((data, i) => button(images, `image ${i + 1}`, i < 9 ? [`${i + 1}`] : [], vote(i))
        .prepend(picture(data, `image ${i + 1} of ${count}`)));
      button(others, "none of them", ["n", "0"], vote(null));
    } else {
      images.append(picture(ballot.images[0], "the image"));
      button(others, "yes", ["y"], vote(0));
      button(others, "no", ["n"], vote(null));
    }
  }
  if (state.undo) button(others, "undo", ["u"], () => go("/undo", {}));
  find("question").focus();
}

function move(key) {
  const buttons = [...document.querySelectorAll("button")], now = buttons.indexOf(document.activeElement);
  const top = b => b.getBoundingClientRect().top, columns = buttons.filter(b => top(b) === top(buttons[0])).length;
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[key];
  if (now < 0) buttons[0]?.focus();
  else buttons[Math.min(Math.max(now + step, 0), buttons.length - 1)].focus();
}

document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const act = answers[event.key.toLowerCase()];
  if (act) act();
  else if (event.key.startsWith("Arrow")) move(event.key);
  else return;
  event.preventDefault();
});
addEventListener("hashchange", () => location.reload());
go("/ballot");
