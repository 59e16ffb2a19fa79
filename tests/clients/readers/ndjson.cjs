// Lê o streaming com o pacote ndjson do npm e escreve cada objeto, numa linha, assim que ele chega.
const http = require("node:http");
const ndjson = require("ndjson");

http.request(process.argv[2], { method: "POST" }, (response) => {
  // strict: uma linha que não seja JSON é um erro, não é pulada.
  response.pipe(ndjson.parse({ strict: true })).on("data", (value) => console.log(JSON.stringify(value)));
}).end("{}");
