// Lê o streaming com o fetch do Node.js e escreve cada objeto, numa linha, assim que ele chega.
const response = await fetch(process.argv[2], { method: "POST", body: "{}" });
const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
let rest = "";
for (;;) {
  const { done, value } = await reader.read();
  if (done) break;
  const lines = (rest + value).split("\n");
  rest = lines.pop();
  for (const line of lines) console.log(JSON.stringify(JSON.parse(line)));
}
