package main

import (
	"context"
	"fmt"
	"log"
	"math/rand"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "example.com/app/torchrelay/v1" // by protoc-gen-go and protoc-gen-go-grpc
)

func main() {
	plaintext := grpc.WithTransportCredentials(insecure.NewCredentials())
	connection, err := grpc.NewClient(os.Getenv("TORCHRELAY_ADDRESS"), plaintext)
	if err != nil {
		log.Fatal(err)
	}
	client := pb.NewGenerationServiceClient(connection)
	ctx := metadata.AppendToOutgoingContext(context.Background(),
		"authorization", "Bearer "+os.Getenv("TORCHRELAY_API_KEY"))
	stream, err := client.StreamGenerate(ctx, &pb.StreamGenerateRequest{
		Model:           os.Getenv("TORCHRELAY_MODEL"),
		Input:           &pb.GenerationInput{Input: &pb.GenerationInput_Text{Text: "The capital of France is"}},
		Config:          &pb.GenerationConfig{MaxTokens: proto.Uint32(16)},
		DisconnectGrace: durationpb.New(30 * time.Second), // how long it goes on without us
	})
	if err != nil {
		log.Fatal(err)
	}
	next := func() (*pb.GenerationEvent, error) {
		response, err := stream.Recv()
		return response.GetEvent(), err
	}
	last := &pb.ResumeGenerationRequest{}
	for {
		event, err := next()
		if status.Code(err) == codes.Unavailable && last.GenerationId != "" {
			time.Sleep(time.Duration(rand.Int63n(int64(time.Second)))) // not every caller at once
			resumed, err := client.ResumeGeneration(ctx, last)
			next = func() (*pb.GenerationEvent, error) {
				if err != nil {
					return nil, err
				}
				response, err := resumed.Recv()
				return response.GetEvent(), err
			}
			continue
		}
		if err != nil {
			log.Fatal(err)
		}
		if accepted := event.GetAccepted(); accepted != nil {
			last.GenerationId = accepted.GenerationId
		}
		last.AfterSequence, last.ChainHash = event.Sequence, event.ChainHash
		for _, delta := range event.GetDeltas().GetDeltas() {
			fmt.Print(delta.Text)
		}
		if event.GetFinished() != nil {
			return
		}
	}
}
