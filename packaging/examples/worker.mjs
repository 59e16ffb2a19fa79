// Worker de exemplo em Node.js: tira tarefas da fila REDIS_QUEUE (a mesma do proxy) e responde em partes. Precisa do
// pacote redis do npm. Para fazer o seu, troque answer(). worker.py mostra o que falta aqui: as quedas e os erros no meio.
import { createClient } from "redis";

const { REDIS_SERVER = "127.0.0.1:6379/1", REDIS_PASSWORD, REDIS_QUEUE = "ndjson_fila" } = process.env;
const parallel = 4;                 // tarefas ao mesmo tempo: cada uma tem a sua conexão, que o BLPOP prende

async function* answer(task) {      // TROQUE ESTA: cada objeto é uma linha para o cliente
  let text = task.body;
  try { text = JSON.parse(text).chatInput ?? text; } catch { /* não é JSON: vale o texto cru */ }
  yield { type: "begin" };
  for (const word of String(text).split(/\s+/)) yield { type: "item", content: word + " " };
  yield { type: "end" };
}

async function serve(link) {
  const { element: key } = await link.blPop(REDIS_QUEUE, 0), found = await link.get(key);
  if (found === null) return;       // venceu enquanto esperava
  const task = JSON.parse(found), list = task.task_list;
  for await (const part of answer(task)) {
    const [alive] = await link.multi().exists(key).rPush(list, JSON.stringify(part)).expire(list, 600).exec();
    if (!alive) return link.del(list);      // o cliente saiu: nosso RPUSH recriou a lista, sem leitor
  }
  await link.del(key);              // "acabou"; a lista o proxy ainda lê
  console.error(`worker: tarefa ${task.task_name}`);
}

for (let number = 0; number < parallel; number++) {
  const url = REDIS_SERVER.includes("://") ? REDIS_SERVER : `redis://${REDIS_SERVER}`;
  const link = createClient({ url, ...(REDIS_PASSWORD && { password: REDIS_PASSWORD }) });
  const report = (error) => console.error(`worker: ${error.message}`);
  link.on("error", number ? () => {} : report);     // a queda é uma só
  link.connect().then(async () => { for (;;) await serve(link).catch(report); });
}
