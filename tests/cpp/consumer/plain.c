/* The C header alone: a token, or the sentence of a refusal. */
#include <edgeattn/edgeattn.h>
#include <stdio.h>
#include <stdlib.h>

int main(int count, char** words)
{
    float const logits[] = {0.5f, 2.0f, 2.0f, -1.0f};
    edgeattn_sampling sampling = {count > 1 ? atof(words[1]) : 0.0, 1.0, 0, 7};
    int64_t token = -1;
    edgeattn_code code = edgeattn_pick(&sampling, logits, 4, 0, &token);
    printf("%d %d %s\n", (int) code, (int) token, edgeattn_last_error());
    printf("%d", (int) edgeattn_pick(NULL, logits, 4, 0, &token));
    printf(" %d\n", (int) edgeattn_pick(&sampling, NULL, 4, 0, &token));
    return 0;
}
