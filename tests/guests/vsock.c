/* vsock connect PORT: standard input to the host's port, and what comes from there to standard output.
 * vsock echo PORT:    one connection to the guest's port gets back what it sends. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

static int move(int from, int to)
{
    static char buffer[65536];
    ssize_t n;
    while ((n = read(from, buffer, sizeof(buffer))) > 0)
        for (ssize_t done = 0, m; done < n; done += m)
            if ((m = write(to, buffer + done, n - done)) <= 0)
                return perror("write"), 1;
    return n < 0 ? perror("read"), 1 : 0;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = strtoul(argv[2], NULL, 10)};
    int s = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (s < 0)
        return perror("socket"), 1;
    if (!strcmp(argv[1], "connect")) {
        address.svm_cid = VMADDR_CID_HOST;
        if (connect(s, (struct sockaddr *)&address, sizeof(address)))
            return perror("connect"), 1;
        if (move(0, s) || shutdown(s, SHUT_WR))
            return 1;
        return move(s, 1);
    }
    address.svm_cid = VMADDR_CID_ANY;
    if (bind(s, (struct sockaddr *)&address, sizeof(address)) || listen(s, 1))
        return perror("listen"), 1;
    puts("LISTENS");
    fflush(stdout);
    int c = accept(s, NULL, NULL);
    if (c < 0)
        return perror("accept"), 1;
    return move(c, c);
}
