// The one thing that needs a script: which axis the curves are drawn against. Without it they stand against steps.
"use strict";
for (const choice of document.querySelectorAll(".axes input")) {
  choice.addEventListener("change", () => {
    document.documentElement.dataset.axis = choice.value;
  });
}
document.documentElement.dataset.axis = "steps";
