// Serves @supabase/lite's REST API over an existing Postgres, on a free port of 127.0.0.1.
// Prints one line of JSON, {"port": N}, once it answers. Goes when its standard input ends.
import { serve } from "@hono/node-server";
import { App } from "@supabase/lite";
import { createPostgresConnection } from "@supabase/lite/postgres";

const connection = createPostgresConnection({ url: process.env.DATABASE_URL });
const app = new App({
  connection,
  auth: {
    enabled: false,
    jwt_secret: process.env.JWT_SECRET,
    publishable_key: process.env.PUBLISHABLE_KEY,
    secret_key: process.env.SECRET_KEY,
  },
  options: { server: { admin: false } },
});

const server = serve(
  {
    port: 0,
    hostname: "127.0.0.1",
    fetch: (request, env) => app.fetch(request, { peerAddress: env.incoming.socket.remoteAddress ?? null }),
  },
  ({ port }) => console.log(JSON.stringify({ port })),
);

process.stdin.resume();
process.stdin.on("end", async () => {
  server.closeAllConnections();
  server.close();
  await connection.close();
  process.exit(0);
});
