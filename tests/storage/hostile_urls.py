"""Image URLs that try to make the service call, or read, something else than its own objects."""

from __future__ import annotations

import socket


def hostile_urls(port: int, *, bucket: str, own_port: int) -> dict[str, str]:
    """Name → URL.

    Args:
        port: Of loopback, where a canary listens: a URL that is fetched is noticed there.
        bucket: Of ours.
        own_port: Where the service itself listens, or its object store.
    """
    at = f"{port}/uploads/a.png"
    name = socket.gethostname()
    return {
        # every way to write loopback
        "loopback": f"http://127.0.0.1:{at}",
        "loopback by https": f"https://127.0.0.1:{at}",
        "localhost": f"http://localhost:{at}",
        "localhost with a dot": f"http://localhost.:{at}",
        "upper case": f"HTTP://LOCALHOST:{at}",
        "IPv6": f"http://[::1]:{at}",
        "IPv6 in full": f"http://[0000:0000:0000:0000:0000:0000:0000:0001]:{at}",
        "IPv4 mapped into IPv6": f"http://[::ffff:127.0.0.1]:{at}",
        "IPv4 mapped, in hex": f"http://[::ffff:7f00:1]:{at}",
        "IPv6 with a zone": f"http://[::1%25lo]:{at}",
        "unspecified": f"http://0.0.0.0:{at}",
        "unspecified IPv6": f"http://[::]:{at}",
        "zero": f"http://0:{at}",
        "decimal": f"http://2130706433:{at}",
        "decimal beyond 32 bits": f"http://6425673729:{at}",
        "octal": f"http://0177.0.0.1:{at}",
        "octal with more zeros": f"http://00000177.0.0.01:{at}",
        "hex": f"http://0x7f000001:{at}",
        "hex by parts": f"http://0x7f.0x0.0x0.0x1:{at}",
        "mixed bases": f"http://0x7f.1:{at}",
        "two parts": f"http://127.1:{at}",
        "three parts": f"http://127.0.1:{at}",
        "circled digits": f"http://①②⑦.⓪.⓪.①:{at}",
        "full-width digits": f"http://１２７.０.０.１:{at}",
        "full-width stop": f"http://127。0。0。1:{at}",
        "encoded host": f"http://%31%32%37.0.0.1:{at}",
        "soft hyphen in the host": f"http://local\u00adhost:{at}",
        "homoglyph": f"http://ⅼocalhost:{at}",
        "mathematical letters": f"http://\U0001d4f5\U0001d4f8\U0001d4ec\U0001d4ea\U0001d4f5host:{at}",
        # names that resolve inside
        "name of this machine": f"http://{name}:{at}",
        "IPv6 name of loopback": f"http://ip6-localhost:{at}",
        "subdomain of localhost": f"http://s3.localhost:{at}",
        "a name that wraps an address": f"http://127.0.0.1.nip.io:{at}",
        "metadata service": "http://169.254.169.254/latest/meta-data/iam",
        "metadata service by name": "http://metadata.google.internal/computeMetadata/v1/",
        "metadata service, IPv6": "http://[fd00:ec2::254]/latest/meta-data/",
        # user-info, ports and confusions of parsers
        "user-info": f"http://images.example.com@127.0.0.1:{at}",
        "user-info and password": f"http://images.example.com:443@127.0.0.1:{at}",
        "user-info, encoded": f"http://images.example.com%40127.0.0.1:{at}",
        "user-info twice": f"http://a@b@127.0.0.1:{at}",
        "fragment before the host": f"http://127.0.0.1:{port}#@images.example.com/uploads/a.png",
        "query before the host": f"http://127.0.0.1:{port}?@images.example.com/uploads/a.png",
        "backslash before the host": f"http://127.0.0.1:{port}\\@images.example.com/uploads/a.png",
        "backslashes": f"http:\\\\127.0.0.1:{port}\\uploads\\a.png",
        "no slashes": f"http:127.0.0.1:{at}",
        "one slash": f"http:/127.0.0.1:{at}",
        "many slashes": f"http://///127.0.0.1:{at}",
        "no scheme": f"//127.0.0.1:{at}",
        "host and port alone": f"127.0.0.1:{at}",
        "port with a sign": f"http://127.0.0.1:+{at}",
        "port with zeros": f"http://127.0.0.1:0000{at}",
        "another port of ours": "http://127.0.0.1:22/uploads/a.png",
        "our port, not our path": f"http://127.0.0.1:{own_port}/metrics",
        "our port, up": f"http://127.0.0.1:{own_port}/files/../metrics",
        "blank in front": f" http://127.0.0.1:{at}",
        "tab in the scheme": f"ht\ttp://127.0.0.1:{at}",
        "newline in the host": f"http://127.0.0.1\n:{at}",
        "CRLF and a header": f"http://127.0.0.1:{port}/a.png HTTP/1.1\r\nX-Injected: 1\r\n\r\n",
        "CRLF, encoded": f"http://127.0.0.1:{port}/a.png%20HTTP/1.1%0d%0aX-Injected:%201",
        "NUL in the host": f"http://127.0.0.1\x00.images.example.com:{at}",
        "NUL, encoded": f"http://127.0.0.1%00.images.example.com:{at}",
        "very long": f"http://127.0.0.1:{port}/" + "a" * 8000,
        "very long host": f"http://{'a' * 8000}:{at}",
        # redirects
        "a redirecting query": f"https://images.example.com/uploads/a.png?redirect=http://127.0.0.1:{at}",
        "a URL as the key": f"uploads/http://127.0.0.1:{at}",
        "a proxy request": f"https://images.example.com/http://127.0.0.1:{at}",
        # other schemes
        "file": "file:///etc/passwd",
        "file on localhost": "file://localhost/etc/passwd",
        "file, encoded": "file:///%65tc/passwd",
        "file of this process": "file:///proc/self/environ",
        "netdoc": "netdoc:///etc/passwd",
        "jar": f"jar:http://127.0.0.1:{port}!/a.png",
        "gopher": f"gopher://127.0.0.1:{port}/_GET%20/",
        "dict": f"dict://127.0.0.1:{port}/info",
        "ftp": f"ftp://127.0.0.1:{at}",
        "ldap": f"ldap://127.0.0.1:{port}/",
        "websocket": f"ws://127.0.0.1:{at}",
        "unix": "unix:///run/docker.sock",
        "http over a unix socket": "http+unix://%2Frun%2Fdocker.sock/info",
        "data": "data:image/png;base64,iVBORw0KGgo=",
        "blob": f"blob:http://127.0.0.1:{port}/0c9f7f1e",
        # other buckets, other keys
        "foreign bucket": "s3://another-bucket/uploads/a.png",
        "foreign bucket with a host": f"s3://127.0.0.1:{at}",
        "bucket with user-info": f"s3://{bucket}@127.0.0.1:{at}",
        "bucket, up": f"s3://{bucket}/../another-bucket/a.png",
        "absolute path": "/etc/passwd",
        "up from uploads": "uploads/../../../../etc/passwd",
        "up, encoded": "uploads/%2e%2e/%2e%2e/etc/passwd",
        "up, encoded slash": "uploads/..%2f..%2fetc%2fpasswd",
        "up, encoded twice": "uploads/%252e%252e/%252e%252e/etc/passwd",
        "up, overlong UTF-8": "uploads/%c0%ae%c0%ae/etc/passwd",
        "up, full-width dots": "uploads/．．/．．/etc/passwd",
        "up, two-dot leader": "uploads/‥/‥/etc/passwd",
        "up, backslashes": "uploads\\..\\..\\etc\\passwd",
        "up, semicolons": "uploads/..;/..;/etc/passwd",
        "the rows": "uploads/../tasks.sqlite3",
        "home": "uploads/~root/.ssh/id_rsa",
        "shell": "uploads/$(curl${IFS}127.0.0.1)",
    }
