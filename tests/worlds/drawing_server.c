/* A server that draws random numbers in every way that C's library has: drawing_server PORT [SEED]
 *
 * It has drawn some when it listens, as servers have, and then says its port, which the kernel chose if it is 0. `/draw` draws once of
 * each. `/forked` is what a child draws that has seeded itself by 7, after many more. Everything else is well. SEED: of all of them.
 */
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static void seed(unsigned by)
{
	srand(by);
	srand48(by);
}

static int draw(char *to, size_t size)
{
	int drawn = rand();
	long more = random();
	double fraction = drand48();
	long whole = lrand48(), signed_ = mrand48();
	return snprintf(to, size, "{\"rand\": %d, \"random\": %ld, \"drand48\": %.17g, \"lrand48\": %ld, \"mrand48\": %ld}", drawn, more, fraction,
			whole, signed_);
}

static int forked(char *to, size_t size)
{
	int ends[2], length;
	if (pipe(ends) < 0)
		return 0;
	pid_t child = fork();
	if (child == 0) {
		seed(7);
		for (int i = 0; i < 200000; i++) /* whatever would seed it again has the time to */
			rand(), drand48();
		length = draw(to, size);
		_exit(write(ends[1], to, length) != length);
	}
	close(ends[1]);
	length = read(ends[0], to, size);
	close(ends[0]);
	waitpid(child, NULL, 0);
	return length < 0 ? 0 : length;
}

static void answer(int client)
{
	char request[4096] = "", body[512] = "{\"well\": true}";
	ssize_t got = read(client, request, sizeof(request) - 1);
	int length = strlen(body);
	if (got > 0 && !strncmp(request, "GET /draw ", 10))
		length = draw(body, sizeof(body));
	else if (got > 0 && !strncmp(request, "GET /forked ", 12))
		length = forked(body, sizeof(body));
	dprintf(client, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n");
	dprintf(client, "Content-Length: %d\r\n\r\n%.*s", length, length, body);
	close(client);
}

int main(int argc, char **argv)
{
	int yes = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t size = sizeof(address);
	char drawn[512];
	if (argc > 2)
		seed(atoi(argv[2]));
	draw(drawn, sizeof(drawn));
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
	if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 16) < 0)
		return 1;
	getsockname(listener, (struct sockaddr *)&address, &size);
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	for (;;) {
		int client = accept(listener, NULL, NULL);
		if (client >= 0)
			answer(client);
	}
}
