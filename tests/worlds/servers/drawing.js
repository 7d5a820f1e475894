// node drawing.js PORT: /draw draws once of each, in this thread and in a worker; it has drawn some when it listens, as servers have.
const crypto = require('crypto');
const http = require('http');
const { Worker, isMainThread, parentPort } = require('worker_threads');

const draw = () => ({
  random: Math.random(),
  uuid: crypto.randomUUID(),
  webUUID: globalThis.crypto ? globalThis.crypto.randomUUID() : crypto.webcrypto.randomUUID(),
  bytes: crypto.randomBytes(16).toString('hex'),
  int: crypto.randomInt(2 ** 47),
  values: Buffer.from(crypto.webcrypto.getRandomValues(new Uint8Array(16))).toString('hex'),
});

if (isMainThread) {
  const worker = new Worker(__filename);
  draw();
  const ask = (then) => {
    worker.once('message', then);
    worker.postMessage('draw');
  };
  ask(() => {
    http.createServer((request, response) => {
      response.setHeader('Content-Type', 'application/json');
      if (request.url !== '/draw') response.end(JSON.stringify({ well: true }));
      else ask((drawn) => response.end(JSON.stringify({ main: draw(), worker: drawn })));
    }).listen(Number(process.argv[2]), '127.0.0.1');
  });
} else {
  parentPort.on('message', () => parentPort.postMessage(draw()));
}
