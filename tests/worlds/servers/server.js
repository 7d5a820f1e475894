// node server.js PORT [WORKERS]: http, or a cluster of so many workers.
const cluster = require('cluster');
const http = require('http');

const port = Number(process.argv[2]);
const workers = Number(process.argv[3] || 0);
if (workers && cluster.isPrimary) {
  for (let i = 0; i < workers; i++) cluster.fork();
} else {
  const answer = JSON.stringify({ answer: 6 * 7 });
  http.createServer((request, response) => {
    response.setHeader('Content-Type', 'application/json');
    response.end(answer);
  }).listen(port, '127.0.0.1');
}
