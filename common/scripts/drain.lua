#!lua flags=allow-oom
-- An operator asks a worker to drain: the answer to its next heartbeat says so. The first who asks is remembered.
-- ARGV  1 worker  2 who asks  3 seconds that this is kept
-- Reply 1, or 0 where there is no such worker any more.
--@include base
if tonumber(call('ZSCORE', P .. 'wl', ARGV[1]) or 0) <= 0 then return 0 end -- 0: it has left
call('SET', P .. 'wi:' .. ARGV[1] .. ':drain', ARGV[2], 'EX', ARGV[3], 'NX')
return 1
