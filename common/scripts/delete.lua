#!lua flags=allow-oom
-- Ends a job if it runs, and erases all that is stored of it, and of the jobs that retries of it as a dead letter made: they
-- hold the same input.
-- ARGV  1 id  2 tenant
-- Reply 1, or nil if there is no such job for this tenant.
--@include base
--@include jobs
if not is_of(ARGV[1], ARGV[2]) then return false end
local id = ARGV[1]
while id do
  local j = load(id)
  if not j then break end
  local made = call('HGET', P .. 'j:' .. id, 'nx')
  if is_live(j) then cancel(j, 'CANCELLED', now_ms()) end
  erase(id)
  call('ZREM', P .. 'failed', id)
  id = made
end
return 1
