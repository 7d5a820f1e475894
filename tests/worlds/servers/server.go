// net/http with its defaults: the listener is MPTCP where the kernel has it.
package main

import (
	"encoding/json"
	"net/http"
	"os"
	"runtime"
)

func main() {
	answers := map[string]int{"fortytwo": 6 * 7}
	http.HandleFunc("/health", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(200) })
	http.HandleFunc("/answer", func(w http.ResponseWriter, r *http.Request) {
		runtime.GC()
		json.NewEncoder(w).Encode(map[string]int{"answer": answers["fortytwo"]})
	})
	if err := http.ListenAndServe("127.0.0.1:"+os.Args[1], nil); err != nil {
		panic(err)
	}
}
