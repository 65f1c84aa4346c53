/**
 * The Worker's R2 binding for tests: Miniflare's own bucket, and behind it the S3 server that the service reads.
 *
 * In R2 a binding and the S3 API are two doors of one bucket. Miniflare's bucket has no S3 door; so what is put through
 * the binding is checked and kept by Miniflare's, and put into the S3 server as well, signed as R2 wants it.
 */
import { AwsClient } from "aws4fetch";

interface PutOptions {
  readonly httpMetadata: { readonly contentType: string };
}

interface Bucket {
  put(key: string, value: ArrayBuffer, options: PutOptions): Promise<unknown>;
}

interface Bindings {
  readonly BUCKET: Bucket;
  readonly ENDPOINT: string;
  readonly NAME: string;
  readonly ACCESS_KEY_ID: string;
  readonly SECRET_ACCESS_KEY: string;
}

export default function bind(env: Bindings): Bucket {
  const s3 = new AwsClient({
    accessKeyId: env.ACCESS_KEY_ID,
    secretAccessKey: env.SECRET_ACCESS_KEY,
    service: "s3",
    region: "auto",
    retries: 0,
  });
  return {
    async put(key, value, options) {
      const object = await env.BUCKET.put(key, value, options);
      const headers = { "Content-Type": options.httpMetadata.contentType };
      const answer = await s3.fetch(`${env.ENDPOINT}/${env.NAME}/${key}`, { method: "PUT", body: value, headers });
      if (!answer.ok) throw new Error(`put: ${answer.status} ${await answer.text()}`);
      return object;
    },
  };
}
