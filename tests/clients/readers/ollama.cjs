// Conversa com o cliente do Ollama em JavaScript (npm ollama) e escreve, numa linha, um JSON do que ele recebeu.
const { Ollama } = require("ollama");

(async () => {
  const client = new Ollama({ host: process.argv[2] });
  const wanted = { model: "eco", messages: [{ role: "user", content: process.argv[3] }] };
  const parts = [];
  let error = null;
  try {
    for await (const part of await client.chat({ ...wanted, stream: true })) parts.push(part.message.content);
    const whole = await client.chat(wanted), plain = await client.generate({ model: "eco", prompt: process.argv[3] });
    const { models } = await client.list();
    parts.push(whole.message.content, plain.response, models[0].name);
  } catch (caught) {
    error = caught.message;
  }
  console.log(JSON.stringify({ parts, error }));
})();
