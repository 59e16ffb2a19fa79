// Lê o streaming com o pacote can-ndjson-stream do npm e escreve cada objeto, numa linha, assim que ele chega.
const parse = require("can-ndjson-stream");

(async () => {
  const response = await fetch(process.argv[2], { method: "POST", body: "{}" });
  const reader = parse(response.body).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    console.log(JSON.stringify(value));
  }
})();
