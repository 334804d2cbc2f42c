/* `medley adapter inspect`. */
#include "server/commands.h"

#include "adapters/inspect.h"
#include "base/strbuf.h"

#include <stdio.h>

int inspect_run(const struct config *c)
{
    struct strbuf text = {0};
    struct error err = {0};
    enum status st = adapter_inspect(c->words.items[0], &text, &err);
    if (!st) fwrite(text.data, 1, text.size, stdout);
    strbuf_release(&text);
    return st ? command_failed(&err) : 0;
}
