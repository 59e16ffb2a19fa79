<?php
// Lê o streaming com o fopen e o fgets do PHP e escreve cada objeto, numa linha, assim que ele chega.
$context = stream_context_create(["http" => ["method" => "POST", "header" => "Content-Type: application/json", "content" => "{}"]]);
$stream = fopen($argv[1], "r", false, $context);
// Sem isto, o fgets espera por 8192 bytes, ou pelo fim.
stream_set_chunk_size($stream, 1);
while (($line = fgets($stream)) !== false) echo json_encode(json_decode($line, flags: JSON_THROW_ON_ERROR)), "\n";
