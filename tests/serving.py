"""A web server on 127.0.0.1 that misbehaves as a test wants it."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Serves `content` under any path; `requests` lists the Range header of each request."""

    def __init__(self, content):
        self.content = content
        self.etag = '"one"'
        self.modified = None
        self.ranges = True  # honours Range
        self.if_range = True  # honours If-Range
        self.cuts = []  # bytes of the body after which the connection breaks, a request each
        self.reset = False  # it breaks with a reset, not an orderly close
        self.statuses = []  # answers before it works
        self.headers = {}  # replace or add
        self.chunked = False
        self.length = True  # sends Content-Length
        self.pause = 0.0  # seconds after each 16 KiB
        self.requests = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with contextlib.suppress(OSError):
                    server.answer(self)
                self.close_connection = True

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request):
        asked = request.headers.get("Range")
        self.requests.append(asked)
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            request.send_error(status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        condition = request.headers.get("If-Range")
        current = condition in (None, self.etag, self.modified) or not self.if_range
        partly = bool(asked) and self.ranges and current
        self.send(request, self.content, start if partly else 0, partly)

    def send(self, request, content, start, partly):
        body = content[start:]
        total = len(content)
        headers = {"Content-Type": "application/octet-stream"}
        if partly:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif self.length:
            headers["Content-Length"] = str(len(body))
        headers |= {"ETag": self.etag, "Last-Modified": self.modified} | self.headers
        request.send_response(206 if partly else 200)
        for name, value in headers.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        for first in range(0, len(body[:cut]), 16384):
            part = body[first : min(first + 16384, len(body) if cut is None else cut)]
            request.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if self.chunked else part)
            time.sleep(self.pause)
        if cut is not None and self.reset:
            linger = b"\1\0\0\0\0\0\0\0"  # on, for 0 seconds: close with a reset
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()
        elif cut is None and self.chunked:
            request.wfile.write(b"0\r\n\r\n")

    def close(self):
        self.http.shutdown()
        self.http.server_close()
