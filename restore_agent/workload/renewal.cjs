// Any Node program that `zerowake snapshot create --renew` starts, and its worker threads: what V8 and Node keep of random numbers is made
// anew in each replica. renewal.py says why, and what the agent writes; renewal.c sees to Node's OpenSSL.
//
//   Math.random         V8 cannot be given another state. After a restore it draws from the kernel's numbers instead, 512 at a time.
//   crypto.randomUUID   Node keeps 128 ahead of need. After a restore it is told not to use them.
//   crypto.randomInt    Node keeps 1,024 ahead of need. The first one after a restore has those drawn that are left.
//
// The agent sends SIGURG, which does nothing to a process that does not ask for it, when it has said the word. All threads look at one number
// that they share before they draw; so none of them draws from the old state once the agent was answered.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const path = require('path');
const workers = require('worker_threads');

const folder = process.env.SNAPSHOT_CONTROL_DIR;
const SHARED = 'zerowake.renewal';

function announce() {
  try {
    const name = `renews-${process.pid}-node`;
    fs.writeFileSync(path.join(folder, `.${name}`), 'SIGURG');
    fs.renameSync(path.join(folder, `.${name}`), path.join(folder, name));
  } catch {
    // It may not write there: then nobody waits for it.
  }
}

if (folder && fs.existsSync(path.join(folder, 'answer.fifo'))) {
  let shared = workers.isMainThread ? null : workers.getEnvironmentData(SHARED);
  if (!shared) {
    shared = new SharedArrayBuffer(4);
    workers.setEnvironmentData(SHARED, shared);
  }
  const restored = new Int32Array(shared);

  const kernels = new Uint32Array(1024);
  let left = 0;
  function draw() {
    if (left === 0) {
      const file = fs.openSync('/dev/urandom', 'r');
      try {
        fs.readSync(file, kernels, 0, kernels.byteLength, null);
      } finally {
        fs.closeSync(file);
      }
      left = kernels.length;
    }
    left -= 2;
    return ((kernels[left] >>> 5) * 67108864 + (kernels[left + 1] >>> 6)) / 9007199254740992; // 53 bits
  }

  const random = Math.random;
  Math.random = function random_() {
    return restored[0] === 0 ? random() : draw();
  };
  Object.defineProperty(Math.random, 'name', { value: 'random' });

  const randomUUID = crypto.randomUUID;
  crypto.randomUUID = function randomUUID_(options) {
    return restored[0] === 0 ? randomUUID(options) : randomUUID({ ...options, disableEntropyCache: true });
  };
  Object.defineProperty(crypto.randomUUID, 'name', { value: 'randomUUID' });
  const randomInt = crypto.randomInt;
  const kept = 1024;
  const preloaded = (process.env.LD_PRELOAD || '').includes('zerowake-renewal');
  let drained = false;
  crypto.randomInt = function randomInt_(...given) {
    if (restored[0] !== 0 && !drained) {
      // What takes their place is of OpenSSL, and new once that said so.
      drained = !preloaded || fs.existsSync(path.join(folder, `renews-${process.pid}-openssl`));
      for (let i = 0; i < kept; i++) randomInt(2);
    }
    return randomInt(...given);
  };
  Object.defineProperty(crypto.randomInt, 'name', { value: 'randomInt' });

  const web = Object.getPrototypeOf(crypto.webcrypto);
  Object.defineProperty(web, 'randomUUID', {
    ...Object.getOwnPropertyDescriptor(web, 'randomUUID'),
    value: function randomUUID() {
      return crypto.randomUUID();
    },
  });
  require('module').syncBuiltinESMExports();

  if (workers.isMainThread) {
    process.on('SIGURG', () => {
      if (fs.existsSync(path.join(folder, 'restore-complete'))) {
        Atomics.store(restored, 0, 1);
        announce();
      }
    });
    announce();
  }
}
