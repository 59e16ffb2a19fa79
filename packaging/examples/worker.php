<?php
// Worker de exemplo em PHP: tira tarefas da fila REDIS_QUEUE (a mesma do proxy) e responde em partes, uma por vez: rode
// quantos quiser. Precisa do phpredis (apt install php-cli php-redis). Para fazer o seu, troque answer(). worker.py mostra
// o que falta aqui: as quedas e os erros no meio.
$REDIS_SERVER = parse_url("redis://" . (getenv("REDIS_SERVER") ?: "127.0.0.1:6379/1"));     // só ip:porta/database
$REDIS_PASSWORD = getenv("REDIS_PASSWORD");
$REDIS_QUEUE = getenv("REDIS_QUEUE") ?: "ndjson_fila";

function answer(array $task): iterable {    // TROQUE ESTA: cada valor é uma linha para o cliente
    yield ["type" => "begin"];
    $text = json_decode($task["body"], true)["chatInput"] ?? $task["body"];
    foreach (preg_split('/\s+/', $text) as $word) yield ["type" => "item", "content" => "$word "];
    yield ["type" => "end"];
}

function serve(Redis $link, string $key): void {
    if (($found = $link->get($key)) === false) return;  // venceu enquanto esperava
    $task = json_decode($found, true);
    $list = $task["task_list"];
    foreach (answer($task) as $part) {
        $line = json_encode($part, JSON_UNESCAPED_UNICODE | JSON_UNESCAPED_SLASHES);
        [$alive] = $link->multi()->exists($key)->rPush($list, $line)->expire($list, 600)->exec();
        if (!$alive) { $link->del($list); return; }     // o cliente saiu: nosso RPUSH recriou a lista, sem leitor
    }
    $link->del($key);                       // "acabou"; a lista o proxy ainda lê
    fwrite(STDERR, "worker: tarefa {$task['task_name']}\n");
}

for (;; sleep(2)) try {
    $link = new Redis();
    $link->connect($REDIS_SERVER["host"], $REDIS_SERVER["port"] ?? 6379);
    if ($REDIS_PASSWORD) $link->auth($REDIS_PASSWORD);
    $link->select((int) trim($REDIS_SERVER["path"] ?? "", "/"));
    for (;;) if ($popped = $link->blPop([$REDIS_QUEUE], 5)) serve($link, $popped[1]);
} catch (RedisException $error) {
    fwrite(STDERR, "worker: {$error->getMessage()}\n");
}
