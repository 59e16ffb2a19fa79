<?php
// Lê o streaming com a extensão curl e escreve cada objeto, numa linha, assim que ele chega.
$rest = "";
$curl = curl_init($argv[1]);
curl_setopt_array($curl, [CURLOPT_POSTFIELDS => "{}", CURLOPT_WRITEFUNCTION => function ($curl, $data) use (&$rest) {
    $lines = explode("\n", $rest . $data);
    $rest = array_pop($lines);
    foreach ($lines as $line) echo json_encode(json_decode($line, flags: JSON_THROW_ON_ERROR)), "\n";
    return strlen($data);
}]);
exit(curl_exec($curl) ? 0 : 1);
