/**
 * Runs the built Worker (dist/worker) in the real Workers runtime, as wrangler.jsonc describes it.
 *
 * EDGE is JSON: `bindings` beside or instead of those of the file, and the S3 server behind the bucket. Prints one line
 * of JSON, {"url": …}, once it answers; what the Worker logs goes to standard error. Ends with its standard input.
 */
import type { Readable } from "node:stream";
import { buildSync } from "esbuild";
import { Log, LogLevel, Miniflare } from "miniflare";
import { unstable_getMiniflareWorkerOptions as readConfig } from "wrangler";

interface Told {
  readonly bindings: Readonly<Record<string, string>>;
  readonly s3: Readonly<Record<"ENDPOINT" | "NAME" | "ACCESS_KEY_ID" | "SECRET_ACCESS_KEY", string>>;
}

const told = JSON.parse(process.env.EDGE ?? "") as Told;
const { workerOptions } = readConfig("wrangler.jsonc");
const { compatibilityDate, compatibilityFlags, bindings, r2Buckets } = workerOptions;
const [bucket, ...others] = Object.keys(r2Buckets ?? {});
if (bucket === undefined || others.length > 0) throw new Error("expected one bucket in wrangler.jsonc");

const built = buildSync({ entryPoints: ["test/r2.ts"], bundle: true, format: "esm", write: false, logLevel: "error" });
const runtime = new Miniflare({
  host: "127.0.0.1",
  port: 0,
  cf: false,
  log: new Log(LogLevel.WARN),
  handleRuntimeStdio: (stdout: Readable, stderr: Readable) => {
    stdout.pipe(process.stderr);
    stderr.pipe(process.stderr);
  },
  unsafeTriggerHandlers: true,
  workers: [
    {
      name: "edge",
      modules: [{ type: "ESModule", path: "dist/worker/worker.js" }],
      ...(compatibilityDate === undefined ? {} : { compatibilityDate }),
      ...(compatibilityFlags === undefined ? {} : { compatibilityFlags }),
      bindings: { ...bindings, ...told.bindings },
      wrappedBindings: { [bucket]: { scriptName: "r2", bindings: told.s3 } },
    },
    { name: "r2", modules: true, script: built.outputFiles[0]?.text ?? "", r2Buckets: { BUCKET: "s3-images" } },
  ],
});
const url = await runtime.ready;
console.log(JSON.stringify({ url: url.origin }));

process.stdin.resume();
process.stdin.on("end", async () => {
  await runtime.dispose();
  process.exit(0);
});
