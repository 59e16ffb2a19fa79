// Lê o streaming com a biblioteca padrão do Go e escreve cada objeto, numa linha, assim que ele chega.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
)

func main() {
	response, err := http.Post(os.Args[1], "application/json", strings.NewReader("{}"))
	if err != nil {
		panic(err)
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(response.Body)
	for {
		var value json.RawMessage
		if err := decoder.Decode(&value); err == io.EOF {
			break
		} else if err != nil {
			panic(err)
		}
		fmt.Println(string(value))
	}
}
